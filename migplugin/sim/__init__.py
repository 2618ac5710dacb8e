"""The practice ground: a simulated NVIDIA driver, a stand-in kubelet, and the demo that joins them.

The rule of this room: it is an independent witness. The simulated driver sits *under* pynvml, so it
imports neither pynvml nor the rooms it is a witness against (nvml, core), and it states the driver's
rules a second time on purpose. It refuses what hardware refuses. Importing this package costs nothing;
whoever wants a driver asks `sim.driver.Simulation.open`.
"""
