"""What nobody foresaw: told with all that is known of it, and tried again; never the end of the agent."""

import sys

from tests.app.conftest import Start

STUMBLE = """
import migplugin.control.reconciler as room
decide, times = room.decide, 0
def stumble(world):
    global times
    times += 1
    if times == 1:
        raise ValueError("unforeseen")
    return decide(world)
room.decide = stumble
from migplugin.cli import main
main()
"""


async def test_a_first_decision_that_fails_is_made_again(machine: Start) -> None:
    node = await machine("1xa30=1g.6gb")
    agent = await node.run(
        *(sys.executable, "-c", STUMBLE, "serve", "--log-format=json", f"--simulate={node.state}"),
        f"--kubelet-socket={node.kubelet.socket}",
        f"--pod-resources-socket={node.kubelet.pod_resources_socket}",
    )
    await node.until(lambda _: node.allocatable("1g.6gb") == 1)
    (line,) = agent.said("unexpected failure, will run again")
    assert "ValueError: unforeseen" in line["traceback"]
    agent.lines.remove(line)
    assert await agent.end() == 0
