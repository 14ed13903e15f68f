"""A CUDA device as far as graphs need one, and what shows beforehand that a capture would fail."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_INDEXING = {"aten::index.Tensor", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
# torch's random generators know of one capture at a time
_one_capture = threading.Lock()


class Card:
    """A CUDA device as far as graphs need one, with the memory that all graphs of a model share.

    That memory is gone with the last of them: the next one needs another card.
    """

    device_type = "cuda"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._last = torch.cuda.Event()

    @staticmethod
    def is_capturing(device: torch.device) -> bool:
        """Whether somebody else records what the caller does."""
        with torch.cuda.device(device):
            return torch.cuda.is_current_stream_capturing()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A call's turn: the card works on it after what earlier calls gave it, from whichever stream."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._last)
            try:
                yield
            finally:
                self._last.record(stream)

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Record ``function``: what replays it, and its result, which each replay writes anew."""
        graph = torch.cuda.CUDAGraph()
        # other threads may wait for the card and ask it for memory in the meantime
        recording = torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local")
        with _one_capture:
            # cuBLAS' workspaces of the stream are the graph's own: one that is shared is freed under the others
            torch._C._cuda_clearCublasWorkspaces()
            try:
                # torch leaves the capture's stream current where a capture fails
                with torch.cuda.stream(torch.cuda.current_stream()), recording:
                    result = function()
            finally:
                torch._C._cuda_clearCublasWorkspaces()
        return graph.replay, result

    def finish(self) -> None:
        """Wait until nothing that was replayed runs any more."""
        self._last.synchronize()


class Watch(TorchDispatchMode):
    """Looks for what no graph can hold: results that Python reads, and copies between the card and elsewhere.

    Attributes:
        found: the first of them, as a sentence.
    """

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """So that what is compiled inside stays so."""
        return True

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.found: str | None = None
        self._device_type = device_type

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_inference_mode_enabled() and isinstance(function, torch._ops.OpOverload):
            # there operations arrive that are made of others, as they are nowhere else
            with self:
                result = function.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        result = function(*args, **(kwargs or {}))
        if self.found is None:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.found = self._why_not_recorded(function, args, tensors)
        return result

    def _why_not_recorded(self, function: Any, args: Any, tensors: list[Tensor]) -> str | None:
        on_card = [tensor for tensor in tensors if tensor.device.type == self._device_type]
        elsewhere = [tensor for tensor in tensors if tensor.device.type != self._device_type]
        if not on_card:
            return None
        name = function.name()
        # a number that lies on the CPU may go with a kernel; of torch.tensor() on the card the last step alone is seen
        is_copy = name in ("aten::_to_copy", "aten::copy_")
        if name == "aten::lift_fresh" or (elsewhere and (is_copy or any(tensor.dim() > 0 for tensor in elsewhere))):
            other = elsewhere[0].device if elsewhere else "cpu"
            return f"its forward copies between {other} and {on_card[0].device} ({name})"
        if name in _INDEXING:  # tagged for the masks that may stand in the place of indices
            indices = [index for index in args[1] if index is not None]
            is_read = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        else:
            tags = getattr(function, "tags", ())  # higher-order ones have none
            is_read = not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.isdisjoint(tags)
        return f"its forward waits for numbers of the card ({name}), which a graph cannot" if is_read else None


@contextmanager
def without_autocast_cache() -> Iterator[None]:
    """Weights that autocast casts once and keeps would be gone when a graph reads them."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
