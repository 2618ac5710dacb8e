"""The loops: see, decide, act.

The rule of this room: it knows neither NVML nor the kubelet, only the Protocols of `ports`, and it
decides nothing itself. What to do is the core's answer; when to look is all there is here.
"""
