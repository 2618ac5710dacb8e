"""Tests of the NVML edge: on the simulated driver, whose C functions are called through the real pynvml."""
