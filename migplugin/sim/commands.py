"""`migplugin sim`: what a person does to the simulated driver, and what hardware does by itself.

Each command opens the state directory, makes one change under its lock, and says on stderr where the
state lives. A refusal of the driver is one line and exit code 1, wrong input is exit code 2.
"""

import functools
import getpass
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click
import msgspec

from migplugin.errors import InputError, MigpluginError, SimulatorError
from migplugin.sim import picture, spec
from migplugin.sim.codes import TEXTS, Code, EventType
from migplugin.sim.driver import Simulation
from migplugin.sim.model import Gpu, Node
from migplugin.sim.records import WHOLE, Process
from migplugin.sim.store import Store
from migplugin.sim.switches import MEANING, set_switch

P = ParamSpec("P")
R = TypeVar("R")

_GPU = click.argument("gpu", type=click.IntRange(0))


def default_state_dir() -> Path:
    """The per-user directory that is used where neither --state nor MIGPLUGIN_SIM_STATE says otherwise."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and Path(runtime).is_dir():
        return Path(runtime) / "migplugin-sim"
    return Path(tempfile.gettempdir()) / f"migplugin-sim-{os.getuid()}"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="MIGPLUGIN_SIM_STATE",
    show_envvar=True,
    help="Directory of the simulated driver.  [default: one of yours, printed by every command]",
)
@click.pass_context
def sim(ctx: click.Context, state: Path | None) -> None:
    """A simulated NVIDIA driver, to practise on: carve it, break it, look at it.

    Programs that are started with --simulate DIR share it, and see each change at once.

    \b
      migplugin sim init '1xa100-40gb=1g.5gb*7,1xa100-40gb=3g.20gb:2g.10gb:1g.5gb*2'
      migplugin sim show
      migplugin status --simulate "$MIGPLUGIN_SIM_STATE"
    """  # noqa: D301  click's own mark for a paragraph that is not wrapped
    chosen = state or default_state_dir()
    if state is None and chosen.exists() and chosen.stat().st_uid != os.getuid():
        raise click.ClickException(f"{chosen} is not yours ({getpass.getuser()}); choose one with --state")
    ctx.obj = Store(chosen.absolute())
    click.echo(f"state: {ctx.obj.state_dir}", err=True)


def _failure(message: str, exit_code: int) -> click.ClickException:
    failure = click.ClickException(message)
    vars(failure)["exit_code"] = exit_code  # click declares it on the class only
    return failure


def _told(function: Callable[P, R]) -> Callable[P, R]:
    """Errors meant for a person become one line and the right exit code."""

    @functools.wraps(function)
    def tell(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except MigpluginError as exc:
            raise _failure(str(exc), 2 if isinstance(exc, InputError) else 1) from exc
        except OSError as exc:
            raise _failure(f"{exc.filename}: {exc.strerror}", 1) from exc

    return tell


@sim.command()
@click.argument("node", metavar="SPEC")
@click.option("--seed", default="", help="Other UUIDs and serial numbers for the same SPEC.")
@click.option(
    "--switch", "switches", multiple=True, metavar="NAME=VALUE", help="Set a switch from the start."
)
@click.option("--replace", is_flag=True, help="Put the new node in the place of the one that is there.")
@click.option(
    "--if-absent", is_flag=True, help="Keep the driver that is there; one that cannot be read is made anew."
)
@click.pass_obj
@_told
def init(
    store: Store, node: str, seed: str, switches: tuple[str, ...], replace: bool, if_absent: bool
) -> None:
    """Make a simulated node from SPEC, or derive the files of the one in directory SPEC again.

    \b
    SPEC is <n>x<product>[=[<profile>[*<k>][:<profile>[*<k>]...]]][,...]
      2xa100-40gb                  two GPUs, MIG off
      1xh100-80gb=                 one GPU, MIG on and empty
      1xa100-40gb=3g.20gb:1g.5gb*3 one GPU with four MIG devices
      1xa100-40gb=1c.3g.20gb*3     one GPU instance shared by three compute instances
    """  # noqa: D301
    if Path(node).is_dir():
        with Simulation.open(node) as simulation:
            click.echo(f"files of {simulation.state_dir} derived again")
        return

    def prepare(bare: Node) -> None:
        for text in switches:
            name, equals, value = text.partition("=")
            if not equals:
                raise InputError(f"--switch {text!r} is not NAME=VALUE")
            set_switch(bare, name, value)

    if if_absent and store.exists:
        try:
            store.refresh_files()
        except SimulatorError as exc:
            click.echo(f"{exc}; it is made anew", err=True)
            replace = True
        else:
            click.echo(f"there is a simulated driver in {store.state_dir}, and it stays as it is")
            return
    store.create(spec.build(node, seed=seed, prepare=prepare), replace=replace)
    click.echo(picture.draw(store.read()))


@sim.command()
@click.option(
    "-o", "--output", type=click.Choice(["picture", "json"]), default="picture", help="How to print it."
)
@click.pass_obj
@_told
def show(store: Store, output: str) -> None:
    """Draw the node: each GPU, its memory slots, what lies in them and who holds it."""
    node = store.read()
    if output == "json":
        click.echo(json.dumps(msgspec.to_builtins(picture.describe(node)), indent=2))
    else:
        click.echo(picture.draw(node))


@sim.command()
@_GPU
@click.argument("profile")
@click.option(
    "--start", type=click.IntRange(0), help="First memory slot.  [default: the driver's own choice]"
)
@click.option(
    "-C/-E",
    "--compute/--empty",
    default=True,
    help="With a compute instance that takes all of it (the default), or without any.",
)
@click.option(
    "--ci", "cis", multiple=True, metavar="PROFILE", help="These compute instances instead, such as 1c."
)
@click.option("--gi", type=click.IntRange(0), help="Put the compute instance into this GPU instance.")
@click.pass_obj
@_told
def create(
    store: Store,
    gpu: int,
    profile: str,
    start: int | None,
    compute: bool,
    cis: tuple[str, ...],
    gi: int | None,
) -> None:
    """Create a GPU instance of PROFILE on GPU, as `nvidia-smi mig -cgi PROFILE -C` does.

    PROFILE is a name (1g.5gb, 1c.3g.20gb) or the driver's id for it (19).
    """
    with store.change() as node:
        card = node.gpu(gpu)
        name = _profile_name(card, profile)
        if gi is not None:
            made = card.gi(gi)
            cis = (name,)
        else:
            made = card.create(name, start, compute=compute and not cis)
        for ci in cis:
            card.create_ci(made.id, _ci_profile_id(card, made.profile, ci))
        lines = [
            f"GPU {gpu} gi {made.id} ci {ci.id}: {card.ci_name(made, ci)} at slot {made.start}, {ci.uuid}"
            for ci in made.compute
        ]
    click.echo("\n".join(lines or [f"GPU {gpu} gi {made.id}: {name} at slot {made.start}, no MIG device"]))


def _profile_name(card: Gpu, text: str) -> str:
    profile = card.product.by_id(int(text)) if text.isdecimal() else None
    if text.isdecimal() and profile is None:
        raise InputError(f"{card.product.cli_name} has no profile with id {text}")
    name = profile.name if profile else text
    if card.product.by_name(name) is None:
        offered = ", ".join(card.product.profile_names)
        raise InputError(f"{card.product.cli_name} has no profile {name!r}; there are: {offered}")
    return name


def _ci_profile_id(card: Gpu, gi_profile_id: int, text: str) -> int:
    profile = card.product.by_id(gi_profile_id)
    assert profile is not None
    for ci in profile.ci_profiles:
        if text in {f"{ci.slices}c", f"{ci.slices}c.{profile.name}", profile.ci_name(ci)}:
            return ci.id
    offered = ", ".join(profile.ci_name(ci) for ci in profile.ci_profiles)
    raise InputError(f"{profile.name} has no compute profile {text!r}; there are: {offered}")


@sim.command()
@click.argument("gpu", type=click.IntRange(0), required=False)
@click.argument("instance", metavar="[GI[/CI]]", required=False)
@click.option("--uuid", help="The MIG device with this UUID, and its GPU instance if it was the last there.")
@click.option("--all", "everything", is_flag=True, help="Everything on GPU, or on every GPU.")
@click.option("--force", is_flag=True, help="End the processes and leaked handles that hold it first.")
@click.pass_obj
@_told
def destroy(
    store: Store, gpu: int | None, instance: str | None, uuid: str | None, everything: bool, force: bool
) -> None:
    """Destroy a GPU instance with its compute instances (GI), or one compute instance (GI/CI)."""
    if [instance is not None, uuid is not None, everything].count(True) != 1:
        raise InputError("say what to destroy: GPU GI, GPU GI/CI, --uuid UUID, or --all")
    with store.change() as node:
        if uuid is not None:
            targets = [
                (card, gi.id, ci.id if len(gi.compute) > 1 else None)
                for card in node.gpus
                for gi, ci in card.mig_devices()
                if ci.uuid == uuid
            ]
            if not targets:
                raise SimulatorError(f"no MIG device has the UUID {uuid}")
        elif everything:
            cards = node.gpus if gpu is None else (node.gpu(gpu),)
            targets = [(card, gi.id, None) for card in cards for gi in card.instances]
        else:
            assert gpu is not None
            targets = [(node.gpu(gpu), *_instance(instance or ""))]
        for card, gi, ci in targets:
            _destroy(card, gi, ci, force=force)
    for card, gi, ci in targets:
        click.echo(f"GPU {card.index} gi {gi}{'' if ci is None else f' ci {ci}'}: destroyed")


def _instance(text: str) -> tuple[int, int | None]:
    gi, slash, ci = text.partition("/")
    if not gi.isdecimal() or (slash and not ci.isdecimal()):
        raise InputError(f"{text!r} is not an instance; write GI or GI/CI, such as 2 or 2/0")
    return int(gi), int(ci) if slash else None


def _destroy(card: Gpu, gi: int, ci: int | None, *, force: bool) -> None:
    if force:
        _end(card, gi, ci)
    if ci is None:
        card.destroy(gi)
    else:
        card.destroy_ci(gi, ci)


def _end(card: Gpu, gi: int | None, ci: int | None) -> None:
    """End the processes and leaked handles on a GPU as a whole, a GPU instance, or a compute instance."""
    if gi is None:
        card.record.processes.clear()
        return
    card.gi(gi).leaked = False
    for there in card.gi(gi).compute if ci is None else [card.ci(gi, ci)]:
        there.leaked = False
        there.processes.clear()


@sim.command("mig-mode")
@_GPU
@click.argument("mode", type=click.Choice(["on", "off"]))
@click.pass_obj
@_told
def mig_mode(store: Store, gpu: int, mode: str) -> None:
    """Ask for a MIG mode. It stays pending while the GPU is in use or needs a reset."""
    with store.change() as node:
        status = node.gpu(gpu).set_mig_mode(on=mode == "on")
    if status is Code.SUCCESS:
        click.echo(f"GPU {gpu}: MIG is {mode}")
    else:
        click.echo(f"GPU {gpu}: MIG is pending {mode}: {TEXTS[status]}")


@sim.command()
@_GPU
@click.pass_obj
@_told
def reset(store: Store, gpu: int) -> None:
    """Reset a GPU: its instances are gone, a pending MIG mode is active, and it is no longer lost."""
    with store.change() as node:
        node.gpu(gpu).reset()
    click.echo(f"GPU {gpu}: reset")


@sim.command()
@_GPU
@click.argument("number", metavar="XID", type=click.IntRange(0))
@click.option(
    "--gi", type=click.IntRange(0), help="Attributed to this GPU instance.  [default: the whole GPU]"
)
@click.option("--ci", type=click.IntRange(0), help="And to this compute instance of it.")
@click.pass_obj
@_told
def xid(store: Store, gpu: int, number: int, gi: int | None, ci: int | None) -> None:
    """Report an XID error."""
    if ci is not None and gi is None:
        raise InputError("--ci needs --gi")
    with store.change() as node:
        node.gpu(gpu).xid(number, WHOLE if gi is None else gi, WHOLE if ci is None else ci)
    scope = "" if gi is None else f" gi {gi}" + ("" if ci is None else f" ci {ci}")
    click.echo(f"GPU {gpu}{scope}: XID {number}")


@sim.command()
@_GPU
@click.argument("count", type=click.IntRange(0))
@click.option(
    "--gi", type=click.IntRange(0), help="Of this GPU instance.  [default: of the GPU, with MIG off]"
)
@click.option("--ci", type=click.IntRange(0), default=0, show_default=True, help="And this compute instance.")
@click.pass_obj
@_told
def ecc(store: Store, gpu: int, count: int, gi: int | None, ci: int) -> None:
    """Let the driver count COUNT uncorrected memory errors, and report a double-bit error."""
    with store.change() as node:
        card = node.gpu(gpu)
        if gi is None:
            card.ecc(count)
        else:
            card.ecc(count, gi, ci)
    where = "" if gi is None else f" gi {gi} ci {ci}"
    click.echo(f"GPU {gpu}{where}: {count} uncorrected memory errors")


@sim.command()
@_GPU
@click.argument("number", metavar="FIELD", type=click.IntRange(1))
@click.argument("value", type=click.IntRange(0, (1 << 32) - 1), required=False)
@click.pass_obj
@_told
def field(store: Store, gpu: int, number: int, value: int | None) -> None:
    """Let the driver know a field of nvmlDeviceGetFieldValues, or without VALUE not know it.

    230 is the recovery action (1: reset the GPU), 144 a row remap that is pending, 145 one that failed.
    """
    with store.change() as node:
        fields = node.gpu(gpu).record.fields
        if value is None:
            fields.pop(number, None)
        else:
            fields[number] = value
    click.echo(f"GPU {gpu}: field {number} is {'not known' if value is None else value}")


@sim.command()
@_GPU
@click.option("--restore", is_flag=True, help="Bring it back as it was.")
@click.pass_obj
@_told
def lost(store: Store, gpu: int, restore: bool) -> None:
    """Let a GPU fall off the bus: every call on it answers GPU_IS_LOST."""
    with store.change() as node:
        node.gpu(gpu).record.lost = not restore
    click.echo(f"GPU {gpu}: {'back' if restore else 'lost'}")


@sim.command()
@_GPU
@click.argument("gi", type=click.IntRange(0), required=False)
@click.argument("ci", type=click.IntRange(0), required=False)
@click.option("--pid", type=click.IntRange(1), help="[default: one that is not in use]")
@click.option("--name", default="python3", show_default=True)
@click.option("--memory", type=click.IntRange(0), default=256, show_default=True, help="In MiB.")
@click.option("--clear", is_flag=True, help="End the processes there, and free leaked handles.")
@click.option("--leak", is_flag=True, help="A leaked handle instead: in use, and no process to be seen.")
@click.pass_obj
@_told
def busy(
    store: Store,
    gpu: int,
    gi: int | None,
    ci: int | None,
    pid: int | None,
    name: str,
    memory: int,
    clear: bool,
    leak: bool,
) -> None:
    """Let a process run on a compute instance (GPU GI [CI]; CI defaults to 0), or on a GPU as a whole."""
    if leak and gi is None:
        raise InputError("a leaked handle is on an instance: say which GI")
    with store.change() as node:
        card = node.gpu(gpu)
        if clear:
            _end(card, gi, ci)
        elif leak:
            assert gi is not None
            holder = card.gi(gi) if ci is None else card.ci(gi, ci)
            holder.leaked = True
        else:
            used = {process.pid for other in node.gpus for process, _, _ in other.processes}
            pid = pid or next(number for number in range(4242, 1 << 22) if number not in used)
            processes = card.record.processes if gi is None else card.ci(gi, ci or 0).processes
            processes.append(Process(pid, name, memory))
    what = "free" if clear else "a leaked handle" if leak else f"in use by {name} ({pid})"
    click.echo(f"GPU {gpu}{'' if gi is None else f' gi {gi}'}: {what}")


@sim.command()
@_GPU
@click.argument("kind", metavar="TYPE")
@click.option("--data", type=int, default=0, show_default=True)
@click.option("--gi", type=click.IntRange(0, WHOLE), default=WHOLE, help="[default: the whole GPU]")
@click.option("--ci", type=click.IntRange(0, WHOLE), default=WHOLE, help="[default: all of them]")
@click.pass_obj
@_told
def event(store: Store, gpu: int, kind: str, data: int, gi: int, ci: int) -> None:
    """Post any event: TYPE is a name (xid, mig-config-change, clock, ...) or a number such as 0x400."""
    names = {member.name.lower().replace("_", "-"): int(member) for member in EventType}
    try:
        number = names[kind] if kind in names else int(kind, 0)
    except ValueError:
        raise InputError(f"no event type is called {kind!r}; there are: {', '.join(names)}") from None
    with store.change() as node:
        node.post(node.gpu(gpu), number, data, gi, ci)
    click.echo(f"GPU {gpu}: event {number:#x}")


@sim.command()
@click.pass_obj
@_told
def nodes(store: Store) -> None:
    """Make the missing capability device nodes, as nvidia-modprobe does (see the switch capability_nodes)."""
    with store.change() as node:
        made = node.make_nodes()
    click.echo(f"{made} capability nodes made")


@sim.command()
@click.argument("name", required=False)
@click.argument("value", required=False)
@click.pass_obj
@_told
def switch(store: Store, name: str | None, value: str | None) -> None:
    """Set a switch, at once and for everyone; without VALUE show it, without NAME show them all."""
    if name is not None and value is not None:
        with store.change() as node:
            set_switch(node, name, value)
        return
    present: dict[str, Any] = msgspec.to_builtins(store.read().switches)
    wanted = MEANING if name is None else {name.replace("-", "_"): None}
    for key in wanted:
        if key not in MEANING:
            raise InputError(f"no switch is called {key!r}; there are: {', '.join(MEANING)}")
        text = present[key] if isinstance(present[key], str) else json.dumps(present[key])
        click.echo(f"{key}={text}\n    {MEANING[key]}")


if __name__ == "__main__":
    sim(prog_name="migplugin sim")
