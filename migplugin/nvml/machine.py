"""Kinds of machine that have NVIDIA GPUs and are not supported. Told so, in place of advice that cannot help.

WSL and Tegra are told by what a container sees too: the kernel's name and sysfs. The other files are seen
on the machine itself, or where somebody mounted them.
"""

from pathlib import Path

WSL = "this is WSL, which migplugin does not support"
TEGRA = "this is a Tegra (Jetson), which migplugin does not support"
VGPU = "is the vGPU of a guest, which migplugin does not support: MIG is carved on the host"


def unsupported(root: Path = Path("/")) -> str:
    """The kind of this machine as a clause, if it is one of those, else ""."""
    if "WSL" in _read(root / "proc/sys/kernel/osrelease") or _exists(root / "dev/dxg"):
        return WSL
    family = _read(root / "sys/devices/soc0/family").lower()
    if family.startswith("tegra") or _exists(root / "etc/nv_tegra_release"):
        return TEGRA
    return ""


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except OSError:
        return False
    return True


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
