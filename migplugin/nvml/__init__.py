"""The NVML edge: what the driver says, made into plain values.

The rule of this room: it is the only one that imports pynvml. No handle, no ctypes object and no NVML
error leaves it; what leaves are frozen values of the core, and DriverError.
"""
