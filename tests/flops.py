"""The operations of a function: as torch's counter has them, and of the ops that run where it does not look on."""

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import fastsd_kernels.flops  # noqa: F401, counts the ops


def flops_of(function: Callable[[], Any]) -> int:
    """What ``FlopCounterMode`` counts. It puts hooks on all modules, so replaced ones run their stock forward."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


class _Sum(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in flop_registry:
            self.flops += flop_registry[function.overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def flops_without_hooks(function: Callable[[], Any]) -> int:
    """The same formulas for what ``function()`` runs when nobody counts."""
    with _Sum() as counter:
        function()
    return counter.flops
