"""CUDA graphs of a whole model: recorded at the third call with inputs of a shape, and replayed from then on.

They sit in an instance ``forward`` of the model, inside whatever hooks are put on it: hooks run at every call. A
compiler that traces the model sees its stock forward.
"""

import functools
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fastsd.nn.capture import Card, Watch, without_autocast_cache
from fastsd.nn.frozen import GRAPHS, PLAIN_VALUES, Frozen
from fastsd.nn.graph_calls import (
    NotServed,
    key_of,
    laid_out_as,
    settings_of_torch,
    why_no_input,
    why_not_now,
    with_timestep_on,
    without_repeats,
)

MOST = 8  # graphs of one model, where nobody says how many
COMPILED = "it is compiled, and a compiler traces its stock forward"
EAGER_CALLS = 2  # with inputs of one shape: the first one compiles kernels, and both show what a forward changes
_SHAPES = 64  # of which calls are counted
_threads = threading.local()


@dataclass(frozen=True)
class _Graph:
    replay: Callable[[], None]
    inputs: list[Tensor]
    outputs: list[Any]
    spec: TreeSpec

    def __call__(self, inputs: list[Tensor]) -> Any:
        for buffer, given in zip(self.inputs, inputs, strict=True):
            without_repeats(buffer).copy_(without_repeats(given))
        self.replay()
        # the caller's to keep: the next replay of any graph overwrites what this one has written
        leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self.outputs]
        return tree_unflatten(leaves, self.spec)


class _TooEarly(NotServed):
    """One of the first calls of a shape, with the arguments that a graph would get; ``is_last`` of those."""

    def __init__(self, reason: str, key: Any, is_last: bool, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        super().__init__(reason)
        self.key = key
        self.is_last = is_last
        self.arguments = arguments


class Graphs:
    """The CUDA graphs of one model, which stand in its attribute ``_fastsd_graphs``; ``unpatch`` takes them away.

    Args:
        most: how many are kept; one more, and all go.

    Attributes:
        refusal: why the last call ran without a graph; ``None`` where it did not.
        given_up: why no later call will get one either.
        is_called: whether there was a call at all.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.refusal: str | None = None
        self.given_up: str | None = None
        self.is_called = False
        self._held: dict[Any, _Graph] = {}
        self._calls: Counter[Any] = Counter()  # of a thread and a shape, without a graph
        self._unfit: dict[Any, str] = {}  # shapes that no graph can serve, and why
        self._frozen: Frozen | None = None
        self._changed: str | None = None  # the last that has
        self._card: Card | None = None
        self._lock = threading.RLock()

    @property
    def held(self) -> int:
        """How many there are now."""
        return len(self._held)

    def why_not(self, root: nn.Module) -> str | None:
        """Why ``root`` runs without graphs, as far as it can be told now or was seen in its last call."""
        if self.given_up is not None:
            return self.given_up
        if root._compiled_call_impl is not None:
            return COMPILED
        reason = _why_not_on_card(root)
        if reason is None:
            try:
                reason = _why_not(Frozen(root))
            except Exception as error:
                reason = f"a look at the model failed ({_first_lines(error, None)})"
        if reason is None and not self.is_called and has_forward_of_another(root):
            return "something stands in the place of its forward, and has not called the one that graphs are in"
        if reason is None and self.refusal is not None:
            reason = f"in its last call {self.refusal}"
        return reason

    def run(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``root``'s forward gives, by a graph where one can serve the call."""
        self.is_called = True
        refusal, early = self.given_up or why_not_now(), None
        if refusal is None:
            try:
                with self._lock:
                    output = self._serve(root, args, kwargs)
                    self.refusal = None
                    return output
            except _TooEarly as reason:
                refusal, early = str(reason), reason
            except NotServed as reason:
                refusal = str(reason)
        self.refusal = refusal
        if early is None:
            return type(root).forward(root, *args, **kwargs)
        # what a capture would fail at is looked for beforehand: a failed one does harm to the process
        with Watch(Card.device_type) if early.is_last else nullcontext() as watch:
            positional, named = early.arguments
            output = type(root).forward(root, *positional, **named)
        with self._lock:
            self._calls[early.key] += 1
            if watch is not None and watch.found is not None:
                if len(self._unfit) >= _SHAPES:
                    self._unfit.clear()
                self._unfit[early.key[1]] = watch.found
        return output

    def _serve(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # the model is looked at last: that takes the longest
        _refuse(_why_not_on_card(root))
        device = next(tensor.device for tensor in chain(root.parameters(), root.buffers()))
        _refuse("a capture of somebody else's is in progress" if Card.is_capturing(device) else None)
        leaves, spec = tree_flatten(with_timestep_on(device, root, args, kwargs))
        for leaf in leaves:
            _refuse(why_no_input(leaf, device))
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in chain(inputs, root.parameters())):
            raise NotServed("gradients were wanted (run it under torch.no_grad() or torch.inference_mode())")
        _refuse(_why_not(self._look_at(root)))
        key = (repr(spec), *map(key_of, leaves), settings_of_torch(device.type))
        _refuse(self._unfit.get(key))
        graph = self._held.get(key)
        if graph is None:
            self._wait_for(key, tree_unflatten(leaves, spec))
            if len(self._held) >= self.most:
                # one alone cannot go: the others may have memory of torch's libraries in common with it
                self.drop()
                raise NotServed(f"there were {self.most} graphs for other shapes already, which make room")
            self._card = self._card or Card(device)
        assert self._card is not None
        with self._card.turn():
            if graph is None:
                graph = self._held[key] = self._record(root, leaves, spec)
            return graph(inputs)

    def _wait_for(self, shape: Any, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        """Turn away a call that comes too early for a graph. Torch's libraries get ready for each thread by itself."""
        key = _this_thread(), shape
        if len(self._calls) >= _SHAPES:
            self._calls.clear()
        if self._calls[key] < EAGER_CALLS:
            since = "" if self._changed is None else f" since {self._changed} has changed"
            number = f"call {self._calls[key] + 1} with inputs of its shapes{since}"
            reason = f"it was {number}, and call {EAGER_CALLS + 1} is recorded"
            raise _TooEarly(reason, key, self._calls[key] == EAGER_CALLS - 1, arguments)

    def _look_at(self, root: nn.Module) -> Frozen:
        """The model as it is, without the graphs of one that it is no longer."""
        try:
            change = None if self._frozen is None else self._frozen.change()
            if change is not None:
                self._changed = change
                self.drop()
            self._frozen = self._frozen or Frozen(root)
        except Exception as error:  # of an object of somebody's, or of a dictionary that another thread fills
            self.drop()
            raise NotServed(f"a look at the model failed ({_first_lines(error, None)})") from error
        return self._frozen

    def _record(self, root: nn.Module, leaves: list[Any], spec: TreeSpec) -> _Graph:
        card, frozen = self._card, self._frozen
        assert card is not None
        assert frozen is not None
        # ordinary tensors even in inference mode, so that it is seen whether they are written into
        with torch.inference_mode(False), torch.no_grad():
            own = [laid_out_as(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        inputs = [leaf for leaf in own if isinstance(leaf, Tensor)]

        def call() -> Any:
            args, kwargs = tree_unflatten(own, spec)
            return type(root).forward(root, *args, **kwargs)

        versions = frozen.versions(), [buffer._version for buffer in inputs]
        outside = sys.exc_info()[1]  # of whose handler this is a part
        try:
            with without_autocast_cache():
                replay, output = card.capture(call)
        except Exception as error:
            raise self._give_up(f"a capture failed ({_first_lines(error, outside)})") from error
        finally:
            del outside  # whose traceback knows this frame
        change = frozen.change()
        if change is not None:
            raise self._give_up(f"its forward changes the model, which a graph would not: {change}")
        if versions != (frozen.versions(), [buffer._version for buffer in inputs]):
            raise self._give_up("its forward writes into its inputs or into tensors of the model")
        outputs, output_spec = tree_flatten(output)
        for leaf in outputs:
            if type(leaf) is not Tensor and not isinstance(leaf, PLAIN_VALUES):
                raise self._give_up(f"its output holds a {type(leaf).__qualname__}, expected tensors and plain values")
        return _Graph(replay, inputs, outputs, output_spec)

    def drop(self) -> None:
        """Free every graph, and what is known of the model; the next calls begin anew."""
        with self._lock:
            if self._card is not None:
                self._card.finish()
            self._held.clear()
            self._calls.clear()
            self._unfit.clear()
            self._card = self._frozen = None

    def make_way(self, move: Callable[[Tensor], Tensor]) -> None:
        """Free every graph if ``move`` takes tensors to another device."""
        with self._lock:
            if self._card is not None:
                probe = torch.empty(0, device=self._card.device)
                if move(probe).device != probe.device:
                    self._changed = "its device"
                    self.drop()

    def _give_up(self, reason: str) -> NotServed:
        self.drop()
        self.given_up = reason
        warnings.warn(f"fastsd runs a model without CUDA graphs: {reason}", stacklevel=2)
        return NotServed(reason)


def _this_thread() -> object:
    """A token of the thread, which no later one gets, as one may its number."""
    if not hasattr(_threads, "token"):
        _threads.token = object()
    return _threads.token


def graphs_of(root: nn.Module) -> Graphs | None:
    """What ``patch(…, cuda_graphs=…)`` left on a model."""
    return vars(root).get(GRAPHS)


def has_forward_of_another(root: nn.Module) -> bool:
    """Whether something else stands in the place of a model's forward, which graphs would have to go into."""
    forward = vars(root).get("forward")
    is_stock = getattr(forward, "__self__", None) is root and getattr(forward, "__func__", None) is type(root).forward
    return forward is not None and not is_stock and not _is_own(forward)


def give_graphs(root: nn.Module, graphs: Graphs | None) -> None:
    """Let ``root`` use ``graphs`` from now on; ``None`` makes it stock again. Those that it had are freed."""
    attributes = vars(root)
    earlier = graphs_of(root)
    if earlier is not None:
        earlier.drop()
    if graphs is None:
        for name in [name for name, value in attributes.items() if _is_a_trace(name, value)]:
            del attributes[name]
        return
    if earlier is None and has_forward_of_another(root):
        warnings.warn(
            "fastsd gives a model its CUDA graphs not back: something stands in the place of its forward by now",
            stacklevel=2,
        )
        return
    if earlier is None:
        functions = {"forward": _graphed(type(root).forward), **_METHODS}
        attributes.update({name: MethodType(function, root) for name, function in functions.items()})
    attributes[GRAPHS] = graphs


def _graphed(stock: Callable[..., Any]) -> Callable[..., Any]:
    # the name lets a pickle of the bound method, which a hook may keep, become stock's
    @functools.wraps(stock, assigned=("__name__", "__doc__"))
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        graphs = graphs_of(self)
        if graphs is None or torch.compiler.is_compiling():
            return type(self).forward(self, *args, **kwargs)
        return graphs.run(self, args, kwargs)

    return forward


def _reduce_ex(self: nn.Module, protocol: Any) -> str | tuple[Any, ...]:
    """A copy or pickle of a model with graphs: a stock one."""
    reduced = type(self).__reduce_ex__(self, protocol)
    if isinstance(reduced, str) or len(reduced) < 3 or not isinstance(reduced[2], dict):
        return reduced
    reconstruct, args, state, *rest = reduced
    return reconstruct, args, _without_trace(state), *rest


def _replicate(self: nn.Module) -> nn.Module:
    replica = type(self)._replicate_for_data_parallel(self)
    replica.__dict__ = _without_trace(vars(replica))
    return replica


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
    """``.to()`` and its like. Graphs of what leaves their card are freed before; other changes are seen at a call."""
    graphs = graphs_of(self)
    if graphs is not None:
        graphs.make_way(fn)
    return type(self)._apply(self, fn, *args, **kwargs)


_METHODS: dict[str, Callable[..., Any]] = {
    "__reduce_ex__": _reduce_ex,
    "_replicate_for_data_parallel": _replicate,
    "_apply": _apply,
}


def _without_trace(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if not _is_a_trace(name, value)}


def _is_a_trace(name: str, value: Any) -> bool:
    # not what a hook that was put on later has kept of them
    return name == GRAPHS or (name in ("forward", *_METHODS) and _is_own(value))


def _is_own(method: Any) -> bool:
    return isinstance(method, MethodType) and method.__func__.__module__ == __name__


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise NotServed(reason)


def _why_not(frozen: Frozen) -> str | None:
    """Why no call of such a model can be served, as a sentence, or ``None``."""
    if frozen.refusal is None and len(frozen.devices) > 1:
        return f"what the model holds is on {' and '.join(map(str, frozen.devices))}, and a graph is of one device"
    return frozen.refusal


def _why_not_on_card(root: nn.Module) -> str | None:
    devices = {str(tensor.device) for tensor in chain(root.parameters(), root.buffers())}
    if {device.partition(":")[0] for device in devices} == {Card.device_type}:
        return None
    where = " and ".join(sorted(devices)) or "no device"
    return f"the model is on {where}, and there are CUDA graphs only on a CUDA device"


def _first_lines(error: BaseException, outside: BaseException | None) -> str:
    """Of an error and what it came from, but for what was being handled before."""
    causes = [cause for cause in (error.__context__, error) if cause not in (None, outside)]
    return "; then ".join(str(cause).partition("\n")[0] for cause in causes)
