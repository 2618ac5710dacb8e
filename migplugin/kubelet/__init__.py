"""Where we meet the kubelet: its directory, its sockets, its files.

The rule of this room: it knows how the kubelet behaves and nothing about GPUs. What it serves comes
from a Cell of offers, and what it learns (usage, incarnations, leases) leaves as plain values.
The two APIs are spoken here and nowhere else but in the stand-in kubelet.
"""

import os

# gRPC's core reports every peer that goes away as an error, and it reads this once, when first imported.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
