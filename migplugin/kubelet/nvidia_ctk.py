"""NVIDIA's own generator of CDI documents, asked for what it would write. Nothing is written."""

import asyncio
import contextlib
import json
import shutil
from collections.abc import Mapping
from typing import Any

from migplugin.errors import CdiError

PROGRAM = "nvidia-ctk"
WITHIN = 60.0


async def generate(driver_root: str, dev_root: str, vendor: str, class_: str) -> Mapping[str, Any]:
    """The document that `nvidia-ctk cdi generate` prints here, with UUIDs for names.

    Raises CdiError where there is no such program, or it fails.
    """
    program = shutil.which(PROGRAM)
    if program is None:
        raise CdiError(
            f"{PROGRAM} is not on PATH, there is nothing to compare with; "
            "run this on the host, where the NVIDIA container toolkit is installed"
        )
    command = [program, "cdi", "generate", "--format=json", "--device-name-strategy=uuid"]
    command += [f"--vendor={vendor}", f"--class={class_}"]
    command += [f"--driver-root={driver_root}"] if driver_root not in {"", "/"} else []
    command += [f"--dev-root={dev_root}"] if dev_root not in {"", "/"} else []
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(WITHIN):
            printed, said = await process.communicate()
    except TimeoutError as exc:
        raise CdiError(f"{' '.join(command)} does not end within {WITHIN:g} s") from exc
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode:
        words = said.decode(errors="replace").strip().splitlines() or ["without a word"]
        raise CdiError(f"{' '.join(command)} ended with {process.returncode}: {words[-1]}")
    try:
        document = json.loads(printed)
    except ValueError as exc:
        raise CdiError(f"{' '.join(command)} printed no JSON: {exc}") from exc
    if not isinstance(document, dict):
        raise CdiError(f"{' '.join(command)} printed no document but {type(document).__name__}")
    return document
