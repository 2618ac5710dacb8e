"""Our own control socket: what the running agent answers to its commands, and how they ask.

The rule of this room: it carries documents and words, and decides nothing. Both ends are here and know
neither GPUs nor the kubelet; what the agent says and does is given to the server as a Protocol.
Nothing of it is imported before it is needed, for gRPC is slow to import.
"""

import os

# As in kubelet/: gRPC's core reads this once, when first imported.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
