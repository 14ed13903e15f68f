"""What every op shares: one schema, one fake kernel, autograd, autocast, and the choice of a backend.

An op lives in a package ``fastsd_kernels.<op>`` and is declared once, in its ``__init__.py``::

    op = Op("group_norm_silu", SCHEMA, check=..., fake=..., backward=..., setup_context=..., autocast=...)

Its backends are modules of that package, imported when they are first considered:

=============  ==================
backend        module
=============  ==================
``cuda``       ``cuda_impl.py``
``triton``     ``triton_impl.py``
``cpu``        ``cpu_impl.py``
``reference``  ``reference.py``
=============  ==================

A backend module has three functions. ``unavailable() -> str | None`` says why the backend cannot run on this
machine at all; ``reject(*args) -> str | None`` says why it cannot serve these arguments; ``run(*args)`` computes.
Both refusals are sentences that a user can act on. The reference never refuses.

The choice is made below torch's dispatcher, so that ``torch.compile`` sees one opaque op.
"""

import functools
import importlib
import inspect
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

BACKENDS = ("cuda", "triton", "cpu", "reference")
ENVIRONMENT_VARIABLE = "FASTSD_BACKEND"

_MODULES = {"cuda": "cuda_impl", "triton": "triton_impl", "cpu": "cpu_impl", "reference": "reference"}
_NO_FORWARD_MODE = "{} has no forward-mode derivative; use reverse mode, or its reference"
_library = torch.library.Library("fastsd", "FRAGMENT")
_registry: dict[str, "Op"] = {}


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot run: on this machine, or with these arguments."""


def ops() -> tuple["Op", ...]:
    """Every op of the library, in the order of declaration."""
    return tuple(_registry.values())


@functools.cache
def _backend_order() -> dict[str, dict[str, list[str]]]:
    return json.loads((files(__package__) / "backend_order.json").read_text())


@functools.cache
def _device_keys(device: torch.device) -> tuple[str, ...]:
    """The keys of ``backend_order.json`` that speak of ``device``, the most specific first."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return (f"cuda:{major}.{minor}", "cuda")
    return (device.type,)


@dataclass(frozen=True)
class Backend:
    """One implementation of one op; its module is imported when it is first asked."""

    op: str
    name: str

    @functools.cached_property
    def module(self) -> ModuleType:
        return importlib.import_module(f"fastsd_kernels.{self.op}.{_MODULES[self.name]}")

    def unavailable(self) -> str | None:
        """Why the backend cannot run on this machine at all, or ``None``."""
        return self.module.unavailable()

    def reject(self, *args: Any) -> str | None:
        """Why the backend cannot run, here or with these arguments, or ``None``."""
        return self.module.unavailable() or self.module.reject(*args)


class Op:
    """Declares ``torch.ops.fastsd.<name>``.

    Args:
        name: the stem of the op everywhere.
        schema: arguments and result, without the name; begins with a tensor, ends with ``str? backend=None``.
        check: raises ``ValueError`` or ``TypeError`` on bad arguments; called for real and for fake tensors.
        fake: the result's shape, dtype and strides; takes the arguments without ``backend``.
        setup_context, backward: the gradient, as for :func:`torch.library.register_autograd`; ``backward``
            returns one gradient for each argument, ``backend`` excluded, which it finds as ``ctx.backend``.
        prefer: the backend that was measured to be the fastest on a CUDA device for these arguments, or ``None``; takes
            the arguments without ``backend``. Without it, and elsewhere, the order of the device decides.
        autocast: device type to dtype: what floating-point arguments are cast to under ``torch.autocast``, ``None``
            for the dtype that is in force there. A device type that is missing runs on the arguments as they are.
        flops: multiplications and additions of the products of a call, as ``torch.utils.flop_counter`` counts them in
            the definition; takes the result, then the arguments without ``backend``. ``None`` for an op without any.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        check: Callable[..., None],
        fake: Callable[..., Tensor],
        setup_context: Callable[..., None],
        backward: Callable[..., tuple[Any, ...]],
        autocast: dict[str, torch.dtype | None],
        prefer: Callable[..., str | None] | None = None,
        flops: Callable[..., int] | None = None,
    ) -> None:
        self.name = name
        self.check = check
        self.prefer = prefer
        self.backends = {backend: Backend(name, backend) for backend in BACKENDS}
        _library.define(name + schema)
        qualified = f"fastsd::{name}"
        defaults = _defaults(qualified)

        # torch leaves trailing arguments that equal their default out of the call
        def complete(args: tuple[Any, ...]) -> tuple[Any, ...]:
            return args + defaults[len(args) :]

        def kernel(*given: Any) -> Tensor:
            return self.run(*complete(given))

        def fake_kernel(*given: Any) -> Tensor:
            *args, _ = complete(given)
            check(*args)
            return fake(*args)

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            *args, ctx.backend = complete(inputs)
            setup_context(ctx, tuple(args), output)

        def gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
            return (*backward(ctx, grad), None)

        def count(*given: Any, out_val: Tensor) -> int:
            *args, _ = complete(given)
            assert flops is not None  # or nobody asks
            return flops(out_val, *args)

        _library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(qualified, fake_kernel, lib=_library)
        torch.library.register_autograd(qualified, gradient, setup_context=setup, lib=_library)
        self.overload: Callable[..., Any] = getattr(torch.ops.fastsd, name).default
        for device_type, dtype in autocast.items():
            _library.impl(name, _autocast(self.overload, device_type, dtype), f"Autocast{device_type.upper()}")
        self.flops = None if flops is None else count
        _registry[name] = self

    def run(self, *given: Any) -> Tensor:
        """What the dispatcher calls, with the arguments of the schema, ``backend`` included."""
        *args, backend = given
        self.check(*args)
        if forward_ad._current_level >= 0:
            _refuse_tangents(self.name, args)
        result: Tensor = self.choose(*args, backend=backend).module.run(*args)
        return result

    def __call__(self, *args: Any) -> Tensor:
        """The op on the arguments of its schema, ``backend`` included."""
        _refuse_jvp(self.name, args)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.overload(*args)
        # what autograd's layer would do too, after some Python of its own
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args)

    @property
    def cases(self) -> ModuleType:
        """The inputs that the op is tried with: the submodule ``cases`` of its package."""
        return importlib.import_module(f"fastsd_kernels.{self.name}.cases")

    def order(self, device: torch.device) -> list[str]:
        """The backends to ask on ``device``, the fastest first, as measured; see ``backend_order.json``."""
        table = _backend_order()[self.name]
        return next((table[key] for key in _device_keys(device) if key in table), ["reference"])

    @functools.lru_cache(maxsize=64)  # noqa: B019 - ops live as long as the process
    def _available(self, device: torch.device) -> tuple[Backend, ...]:
        return tuple(self.backends[name] for name in self.order(device) if not self.backends[name].unavailable())

    def _preferred(self, *args: Any) -> str | None:
        return self.prefer(*args) if self.prefer is not None and args[0].device.type == "cuda" else None

    def explain(self, *args: Any) -> Iterator[tuple[str, str | None]]:
        """Each backend for these arguments with its refusal, or ``None`` where it serves them; the fastest first."""
        preferred = self._preferred(*args)
        for name in sorted(self.order(args[0].device), key=lambda name: name != preferred):
            yield name, self.backends[name].reject(*args)

    def choose(self, *args: Any, backend: str | None = None) -> Backend:
        """The backend that will run: ``backend``, else ``$FASTSD_BACKEND``, else the first that serves.

        Raises:
            ValueError: no backend has that name.
            BackendUnavailable: the backend that was named refuses; the message is its sentence.
        """
        forced, source = backend, "backend"
        if forced is None:
            forced, source = os.environ.get(ENVIRONMENT_VARIABLE) or None, ENVIRONMENT_VARIABLE
        if forced is None:
            candidates: Iterable[Backend] = self._available(args[0].device)
            if (preferred := self._preferred(*args)) is not None:
                candidates = sorted(candidates, key=lambda backend: backend.name != preferred)
            for candidate in candidates:
                if candidate.module.reject(*args) is None:
                    return candidate
        if forced not in self.backends:
            raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}; got {forced!r}")
        refusal = self.backends[forced].reject(*args)
        if refusal is not None:
            raise BackendUnavailable(f"{self.name}: backend {forced!r} cannot be used: {refusal}")
        return self.backends[forced]


def _autocast(overload: Callable[..., Any], device_type: str, dtype: torch.dtype | None) -> Callable[..., Tensor]:
    # not torch.library.register_autocast: it casts to one dtype, whatever the user asked for
    own_keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}"))

    def cast(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.device.type != device_type:
            return value
        if not value.is_floating_point() or value.dtype is torch.float64:
            return value
        return value.to(dtype or torch.get_autocast_dtype(device_type))

    def kernel(*args: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(own_keys):
            return overload(*map(cast, args))

    return kernel


def _refuse_jvp(name: str, args: tuple[Any, ...]) -> None:
    """torch.func's forward mode takes an op that has none for a constant, without a word."""
    functorch = torch._C._functorch
    if torch.compiler.is_compiling() or functorch.peek_interpreter_stack() is None:
        return
    is_jvp = any(level.key() == functorch.TransformType.Jvp for level in functorch.get_interpreter_stack() or ())
    if is_jvp and any(isinstance(arg, Tensor) and functorch.is_functorch_wrapped_tensor(arg) for arg in args):
        raise NotImplementedError(_NO_FORWARD_MODE.format(name))


def _refuse_tangents(name: str, args: list[Any]) -> None:
    for arg in args:
        if isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
            raise NotImplementedError(_NO_FORWARD_MODE.format(name))


def _defaults(qualified: str) -> tuple[Any, ...]:
    """Per argument of the schema its default, or a sentinel where it has none."""
    schema = torch._C._get_schema(qualified, "")
    return tuple(
        argument.default_value if argument.has_default_value() else inspect.Parameter.empty
        for argument in schema.arguments
    )
