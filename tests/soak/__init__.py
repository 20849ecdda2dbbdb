"""The soak: thousands of switches and requests with faults at random moments, and what must hold all the same.

    python -m tests.soak --switches 2000 --requests 20000 --seed 1

The gateway is a process of its own, so that its memory, descriptors and threads are measured from outside. Faults and
requests are drawn from the seed; what meets what depends on the machine's timing, so a seed repeats the mixture, not the run.
"""
