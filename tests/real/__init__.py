"""Real vLLM servers on the CPU, for the tests marked `vllm`."""
