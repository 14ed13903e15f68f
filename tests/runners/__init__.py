"""Ways to run a backend: each op goes through all of them, see :class:`tests.runners.protocol.Runner`."""

from tests.runners.card import Card
from tests.runners.cpu import CPU
from tests.runners.host import Host
from tests.runners.interpreter import Interpreter
from tests.runners.protocol import Runner

RUNNERS: dict[str, Runner] = {
    runner.name: runner for runner in (CPU(), Interpreter(), Host(), Card("triton"), Card("cuda"))
}
