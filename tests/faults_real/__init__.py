"""Faults of real vLLM servers on the CPU, and what a gateway over them makes of each."""
