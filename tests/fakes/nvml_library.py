"""A real libnvidia-ml.so.1, compiled: of a driver without any GPU."""

import shutil
import subprocess
from pathlib import Path

import pytest

from migplugin.nvml.library import SONAME

_SOURCE = """
unsigned int sleep(unsigned int seconds);
int nvmlInitWithFlags(unsigned int flags) { %(init)s return %(code)d; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned int *count) { *count = 0; return 0; }
int nvmlSystemGetDriverVersion(char *out, unsigned int length) {
    const char *text = "%(version)s";
    unsigned int i = 0;
    for (; text[i] && i + 1 < length; i++) out[i] = text[i];
    out[i] = 0;
    return 0;
}
"""

needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


def compile_library(
    root: Path, directory: str, version: str = "580.1", code: int = 0, init: str = ""
) -> Path:
    """Puts it into a driver root, in one move as a package manager does. Its nvmlInit runs `init` and answers
    `code`.
    """
    where = root / directory
    where.mkdir(parents=True, exist_ok=True)
    source, made = where / "nvml.c", where / f"{SONAME}.new"
    source.write_text(_SOURCE % {"version": version, "code": code, "init": init})
    command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{SONAME}", "-o", str(made), str(source)]
    subprocess.run(command, check=True)
    return made.replace(where / SONAME)
