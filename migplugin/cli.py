"""The words of the command line: each command is a call into `app`, and there is no logic here.

Flags come from the settings table, and a room is imported by the command that needs it: `serve` must
start fast, and `--help` faster.
"""

import asyncio
import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from migplugin import __version__
from migplugin.errors import InputError, MigpluginError
from migplugin.settings import CLEAR, SERVE, STATUS, TABLE, Setting, describe, resolve


class _Lazy(click.Group):
    """A group whose `sim` command is imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), "sim"])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "sim":
            from migplugin.sim.commands import sim  # noqa: PLC0415

            return sim
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "-V", "--version", message="migplugin %(version)s")
def cli() -> None:
    """NVIDIA MIG on Kubernetes as a live resource.

    Try it without a GPU: `migplugin demo`, or `migplugin status --simulate '1xa100-40gb=1g.5gb*7'`.
    """


def _options(command: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for setting in reversed(TABLE):
            if command in setting.commands and setting.has_flag:
                function = _option(setting)(function)
        return function

    return decorate


def _option(setting: Setting) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    given = [f"environment: {', '.join(setting.env)}"] if setting.env else []
    given += [f"default: {setting.default}"] if setting.default else []
    text = setting.help.replace("`", "") + (f"  [{'; '.join(given)}]" if given else "")
    names = (setting.flag, *setting.aliases, setting.name)
    if setting.is_switch:
        return click.option(*names, is_flag=False, flag_value="true", metavar=setting.metavar, help=text)
    if setting.kind is list:
        # As in NVIDIA's plugin, several values stand behind one flag or behind several.
        return click.option(
            *names,
            multiple=True,
            metavar=setting.metavar,
            help=text,
            callback=lambda _, __, v: ",".join(v) if v else None,
        )
    return click.option(*names, metavar=setting.metavar, help=text)


_plain = click.option(
    "--no-color", is_flag=True, help="Plain text; NO_COLOR in the environment does the same."
)


def _paper(no_color: bool) -> dict[str, Any]:
    """What to draw on: how wide the terminal is, and what it can show."""
    import shutil  # noqa: PLC0415

    return {
        "width": shutil.get_terminal_size((100, 24)).columns,
        "color": sys.stdout.isatty() and not no_color and not os.environ.get("NO_COLOR"),
        "unicode": (sys.stdout.encoding or "").lower().startswith("utf"),
    }


@cli.command()
@_options(SERVE)
def serve(**flags: str | None) -> None:
    """Serve this node's MIG devices to the kubelet, until SIGTERM."""
    settings = resolve(flags, os.environ)
    from migplugin.telemetry.log import configure  # noqa: PLC0415

    configure(settings.log_level, settings.log_format)
    if name := click.get_current_context().find_root().obj:
        logging.getLogger(__name__).info(
            "this is migplugin serve under another name", extra={"called": name, "version": __version__}
        )
    from migplugin import app  # noqa: PLC0415

    sys.exit(asyncio.run(app.serve(settings, lambda: resolve(flags, os.environ))))


@cli.command()
@_options(STATUS)
@click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", help="How to print it."
)
@click.option("--schema", is_flag=True, help="Print the JSON Schema of the JSON output instead.")
@_plain
def status(output: str, schema: bool, no_color: bool, **flags: str | None) -> None:
    """Show this node's GPUs, what sits in them, and who holds it.

    The running agent is asked. Where none answers, or with --simulate, this command looks for itself and
    says so.
    """
    if schema:
        from migplugin.agentapi import document  # noqa: PLC0415

        click.echo(document.schema())
        return
    settings = resolve(flags, os.environ)
    from migplugin import app  # noqa: PLC0415

    shown, note = asyncio.run(app.status(settings))
    if output == "json":
        from migplugin.agentapi import document  # noqa: PLC0415

        if note:
            click.echo(note, err=True)
        click.echo(document.text(shown))
        return
    from migplugin.core.picture import draw  # noqa: PLC0415

    click.echo(draw(shown, note=note, **_paper(no_color)))


@cli.group(invoke_without_command=True)
@_options(STATUS)
@_plain
@click.pass_context
def health(ctx: click.Context, /, no_color: bool, **flags: str | None) -> None:
    """Show who is sick, why, since when and until what.

    It is told by the running agent or, where none answers, from what the last one has recorded.
    """
    ctx.obj = flags
    if ctx.invoked_subcommand is not None:
        return
    from migplugin import app  # noqa: PLC0415
    from migplugin.core.picture import draw_sick  # noqa: PLC0415

    shown, note = asyncio.run(app.status(resolve(flags, os.environ)))
    click.echo(draw_sick(shown, note=note, **_paper(no_color)))


@health.command("clear")
@click.argument("ids", metavar="[ID]...", nargs=-1)
@click.option("--all", "everybody", is_flag=True, help="Everything that is sick of a fault.")
@_options(CLEAR)
@click.pass_obj
def clear_health(
    given: dict[str, str | None], /, ids: tuple[str, ...], everybody: bool, **flags: str | None
) -> None:
    """Take sick devices or whole GPUs, named by UUID, for well: they are offered again at once.

    The agent does it, and says so in its log. Where none runs, it is done for the next one.
    """
    if bool(ids) == everybody:
        raise InputError("health clear: expected either IDs or --all; `migplugin health` shows who is sick")
    settings = resolve(given | {name: text for name, text in flags.items() if text is not None}, os.environ)
    from migplugin import app  # noqa: PLC0415

    for line in asyncio.run(app.clear_health(settings, None if everybody else ids)):
        click.echo(line)


@cli.command()
@_options(SERVE)
@click.option(
    "--check", is_flag=True, help="Only say whether the configuration is sound; unknown keys are errors."
)
@click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", help="How to print it."
)
def config(check: bool, output: str, **flags: str | None) -> None:
    """Show the settings that serve would have here, and where each comes from."""
    from migplugin import app  # noqa: PLC0415

    settings = resolve({**flags, "strict_config": "true"} if check else flags, os.environ)
    app.options(settings)
    if check:
        click.echo(f"{settings.config_file or 'the configuration'} is sound")
        return
    rows = describe(settings)
    if output == "json":
        import json  # noqa: PLC0415

        click.echo(
            json.dumps({name: {"value": value, "from": source} for name, value, source in rows}, indent=2)
        )
        return
    for name, value, source in rows:
        click.echo(f"{name.replace('_', '-'):<34}{value or '-':<50}{source}")
    for finding in settings.document.findings:
        click.echo(f"warning: {finding}", err=True)


@cli.group(invoke_without_command=True)
@_options(STATUS)
@click.pass_context
def cdi(ctx: click.Context, /, **flags: str | None) -> None:
    """Print the CDI document for this node; nothing is written."""
    ctx.obj = flags
    if ctx.invoked_subcommand is not None:
        return
    from migplugin import app  # noqa: PLC0415
    from migplugin.kubelet.cdi import text  # noqa: PLC0415

    document = asyncio.run(app.cdi_document(resolve(flags, os.environ)))
    if document is None:
        click.echo("no device on this node, so there is no document", err=True)
    else:
        click.echo(text(document), nl=False)


@cdi.command()
@click.pass_obj
def diff(flags: dict[str, str | None]) -> None:
    """Compare it with what `nvidia-ctk cdi generate` would write here: exit code 1 if they differ."""
    from migplugin import app  # noqa: PLC0415

    found = asyncio.run(app.cdi_differences(resolve(flags, os.environ)))
    for line in found:
        click.echo(line)
    if found:
        sys.exit(1)
    click.echo("the same devices, nodes, mounts, hooks and variables", err=True)


@cli.command()
def demo() -> None:
    """Show the main job on a simulated node with two A100, within half a minute."""
    from migplugin.sim.demo import run  # noqa: PLC0415

    sys.exit(run())


def main(words: Sequence[str] | None = None, name: str | None = None) -> None:
    """Every foreseeable failure is one line on stderr and an exit code: 1 failed, 2 wrong input.

    `words` stand for those of the command line, and `name` for that of the program, where they are given.
    """
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115  closed by who started us, for us to go on
    try:
        code = cli.main(words, name, standalone_mode=False, obj=name)
    except click.exceptions.Abort:
        code = 130
    except click.exceptions.NoArgsIsHelpError as exc:
        exc.show()
        code = exc.exit_code
    except click.ClickException as exc:
        code = _fail(_one_line(exc), exc.exit_code)
    except InputError as exc:
        code = _fail(str(exc), 2)
    except MigpluginError as exc:
        code = _fail(str(exc), 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as exc:
        if exc.filename is not None or exc.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EIO}:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = _fail(f"cannot write the output: {(exc.strerror or str(exc)).lower()}", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _one_line(exc: click.ClickException) -> str:
    """What click says in three lines, in the way of our own errors."""
    text = exc.format_message().rstrip(".")
    if text[1:2].islower():
        text = text[:1].lower() + text[1:]
    ctx = exc.ctx if isinstance(exc, click.UsageError) else None
    return text if ctx is None else f"{text}; see {ctx.command_path} --help"


def _fail(reason: str, code: int) -> int:
    click.echo(f"migplugin: {reason}", err=True)
    return code
