"""migplugin: NVIDIA MIG on Kubernetes as a live resource."""

__version__ = "0.1.0"
