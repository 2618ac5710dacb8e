"""Measured beside a floor in the same run, never as timed tests: these machines are noisy, ratios are not."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # read once, when grpc is first imported
