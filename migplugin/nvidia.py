"""The names of NVIDIA's image: so that their chart and the gpu-operator run ours with only the image changed.

`nvidia-device-plugin` is `migplugin serve`, which takes their flags and variables anyway.
`config-manager` links the configuration file that the agent reads, and follows by itself.
"""

import contextlib
import gc
import logging
import os
import signal
import sys
from pathlib import Path

import click

from migplugin.errors import InputError

log = logging.getLogger(__name__)

DEVICE_PLUGIN, CONFIG_MANAGER = "nvidia-device-plugin", "config-manager"
NAMED = "default"  # the name that NVIDIA's fallback strategy `named` looks for


def device_plugin() -> None:
    """The command `nvidia-device-plugin`."""
    gc.disable()  # as in __main__
    from migplugin.cli import main  # noqa: PLC0415

    words = [_long(word) for word in sys.argv[1:]]
    main(["--version"] if words in (["--version"], ["-v"]) else ["serve", *words], DEVICE_PLUGIN)


def _long(word: str) -> str:
    """Go programs take -flag for --flag."""
    return f"-{word}" if len(word) > 2 and word[0] == "-" and word[1].isalpha() else word


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    *("--oneshot", "oneshot"),
    envvar="ONESHOT",
    type=bool,
    is_flag=False,
    flag_value="true",
    default=False,
    help="End when the file is linked.",
)
@click.option(
    "--config-file-srcdir",
    "directory",
    envvar="CONFIG_FILE_SRCDIR",
    metavar="DIR",
    required=True,
    show_envvar=True,
)
@click.option(
    "--config-file-dst", "target", envvar="CONFIG_FILE_DST", metavar="PATH", required=True, show_envvar=True
)
@click.option("--default-config", "chosen", envvar="DEFAULT_CONFIG", metavar="NAME", default="")
@click.option("--kubeconfig", envvar="KUBECONFIG", metavar="PATH", help="Not used.")
@click.option("--node-name", envvar="NODE_NAME", metavar="NAME", help="Not used.")
@click.option("--node-label", "label", envvar="NODE_LABEL", metavar="LABEL", help="Not used.")
@click.option("--fallback-strategies", envvar="FALLBACK_STRATEGIES", metavar="LIST", help="Not used.")
@click.option("--send-signal", envvar="SEND_SIGNAL", metavar="BOOL", help="Not used.")
@click.option("--signal", envvar="SIGNAL", metavar="NUMBER", help="Not used.")
@click.option("--process-to-signal", envvar="PROCESS_TO_SIGNAL", metavar="NAME", help="Not used.")
def _manage(
    oneshot: bool, directory: str, target: str, chosen: str, label: str | None, **_: str | None
) -> None:
    """Link the configuration file for the agent: the default one, else the only one, else an empty one."""
    from migplugin.telemetry.log import configure  # noqa: PLC0415

    # Blocked before there is anything to lose, and taken below: no moment in which it would be missed. And
    # before there is another thread, the log's, which would take the signal in our place and end us.
    ends = {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    configure("info", os.environ.get("MIGPLUGIN_LOG_FORMAT") or "text")
    source = choose(Path(directory), chosen)
    link(Path(target), source)
    log.info("configuration linked", extra={"file": target, "source": str(source or "empty")})
    unused = [name for name in names(Path(directory)) if source is None or name != source.name]
    if unused:
        log.warning(
            "the choice by node label comes with partitioning, until then these files are not used",
            extra={"files": unused, "label": label},
        )
    else:
        log.info("the choice by node label comes with partitioning; the agent follows the file by itself")
    if not oneshot:
        log.info("stopping", extra={"signal": signal.Signals(signal.sigwait(ends)).name})


def choose(directory: Path, chosen: str) -> Path | None:
    """The file to use: `chosen`, else the one named "default", else the only one, else None for an empty one.

    Raises InputError where there is no such file or directory.
    """
    found = names(directory)
    if chosen and chosen not in found:
        raise InputError(
            f"DEFAULT_CONFIG={chosen}: no such file in {directory}, only {', '.join(found) or 'none'}"
        )
    name = chosen or (NAMED if NAMED in found else found[0] if len(found) == 1 else "")
    return directory / name if name else None


def names(directory: Path) -> list[str]:
    """The files in it. Raises InputError where there is no such directory."""
    try:
        # A mounted ConfigMap keeps its versions beside the files, under names that begin with two dots.
        return sorted(p.name for p in directory.iterdir() if not p.name.startswith(".") and p.is_file())
    except OSError as exc:
        raise InputError(f"CONFIG_FILE_SRCDIR={directory}: {exc.strerror}") from exc


def link(target: Path, source: Path | None) -> None:
    """`target` is a link to `source`, or an empty file where that is None, at no moment anything else.

    Raises InputError where its directory does not let us.
    """
    new = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        new.unlink(missing_ok=True)
        if source is None:
            new.touch(0o644)
        else:
            new.symlink_to(source)
        new.replace(target)
    except OSError as exc:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise InputError(f"CONFIG_FILE_DST={target}: {exc.strerror}") from exc


def config_manager() -> None:
    """The command `config-manager`: exit code 0, or 2 with one line on what is wrong."""
    try:
        _manage.main(prog_name=CONFIG_MANAGER, standalone_mode=False)
    except click.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)
    except InputError as exc:
        click.echo(f"{CONFIG_MANAGER}: {exc}", err=True)
        sys.exit(2)
