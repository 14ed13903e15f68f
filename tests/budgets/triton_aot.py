"""Triton kernels compiled ahead of time, without a GPU, exactly as they would be compiled at their launch.

The kernels must be real ones: a process where ``TRITON_INTERPRET=1`` was set at import has none.
"""

import ast
import functools
import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton._C.libtriton import get_cache_invalidating_env_vars, ir
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import DependenciesFinder, JITCallable

import fastsd_kernels
from fastsd_kernels.dispatch import Op
from tests.artefacts import digest
from tests.budgets.gates import Gate
from tests.budgets.targets import TARGETS
from tests.budgets.units import Compiled, Unit

# Triton itself adds the "a" from 9.0 on
_CAPABILITIES = {"sm_80": 80, "sm_90a": 90, "sm_100a": 100}
_POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64"}


class Launch(Protocol):
    """What a backend's ``launches`` returns: ``kernel[grid](*args, num_warps=num_warps)``."""

    @property
    def kernel(self) -> Any: ...
    @property
    def args(self) -> Sequence[Any]: ...
    @property
    def num_warps(self) -> int: ...


class Specialisation(NamedTuple):
    """What Triton derives from the arguments of a launch before it compiles.

    Attributes:
        signature: type by argument name: ``"*fp16"``, ``"i32"``, ``"fp32"`` or ``"constexpr"``.
        constants: value by name of each ``"constexpr"``: those declared so, ``None``, and integers equal to 1.
        divisible_by_16: names of the integers and addresses that are; vector loads depend on it.
    """

    signature: dict[str, str]
    constants: dict[str, Any]
    divisible_by_16: set[str]


def specialise(kernel: Any, args: Sequence[Any]) -> Specialisation:
    """The specialisation of ``kernel`` to positional ``args``; tensors may be on ``meta`` (their address is 0)."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible: set[str] = set()
    for parameter, value in zip(kernel.params, args, strict=True):
        name = parameter.name
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = _type_name(value)
        address_or_integer = value.data_ptr() if isinstance(value, Tensor) else value
        if isinstance(address_or_integer, int) and address_or_integer % 16 == 0:
            divisible.add(name)
    return Specialisation(signature, constants, divisible)


def _type_name(value: Any) -> str:
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if type(value) is int:
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    raise TypeError(f"expected a tensor, an int or a float as a kernel's run-time argument; got {value!r}")


@dataclass(frozen=True, eq=False)
class Triton(Unit):
    """The kernel of one launch, its tensors on ``meta`` or not."""

    backend: ClassVar[str] = "triton"
    launch: Launch

    def sees(self, target: str) -> tuple[Any, ...]:
        signature, constants, divisible = self._specialisation()
        return (
            *toolchain(target),
            sorted(get_cache_invalidating_env_vars().items()),
            code(self.launch.kernel),
            sorted(signature.items()),
            [(name, code(value) if isinstance(value, JITCallable) else value) for name, value in constants.items()],
            sorted(divisible),
            self._options(),
        )

    def compile(self, target: str) -> Compiled:
        # the store keeps what is to be kept
        with triton.knobs.compilation.scope():
            triton.knobs.compilation.always_compile = True
            compiled = triton.compile(self._source(), target=_gpu(target), options=self._options())
        return Compiled(compiled.asm["cubin"], compiled.metadata.shared)

    def ttir(self) -> str:
        """Triton's first intermediate form, before any pass."""
        backend = make_backend(_gpu("sm_80"))
        options, context = backend.parse_options(self._options()), ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        functions = backend.get_codegen_implementation(options)
        source = self._source()
        return str(source.make_ir(_gpu("sm_80"), options, functions, backend.get_module_map(), context))

    def _specialisation(self) -> Specialisation:
        if not isinstance(self.launch.kernel, JITCallable):
            raise RuntimeError("TRITON_INTERPRET=1 leaves nothing to compile; unset it")
        return specialise(self.launch.kernel, self.launch.args)

    def _source(self) -> ASTSource:
        kernel, (signature, constants, divisible) = self.launch.kernel, self._specialisation()
        attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in sorted(divisible)}
        return ASTSource(kernel, signature, constants, attributes)

    def _options(self) -> dict[str, int]:
        return {"num_warps": self.launch.num_warps, "num_stages": 3}


def _gpu(target: str) -> GPUTarget:
    return GPUTarget("cuda", _CAPABILITIES[target], 32)


@functools.cache
def toolchain(target: str) -> tuple[str, str]:
    """The versions of Triton and of the assembler that it takes for ``target``."""
    *_, build = get_ptxas_version(_CAPABILITIES[target]).split()
    return f"Triton {triton.__version__}", f"ptxas {build}"


@functools.cache
def code(kernel: JITCallable) -> str:
    """A digest of a kernel and all that it calls; unlike Triton's own key without comments and numbers of lines."""
    tree = kernel.parse()
    (function,) = tree.body
    if ast.get_docstring(function) is not None:
        function.body = function.body[1:] or [ast.Pass()]
    scope = inspect.getclosurevars(kernel.fn).nonlocals
    calls = _Calls(kernel.__name__, kernel.__globals__, scope, ast.unparse(tree))
    calls.visit(tree)
    constants = {name: value for (name, _), (value, _) in calls.used_global_vals.items()}
    return digest(calls.ret, sorted(constants.items()), getattr(kernel, "noinline", False))


class _Calls(DependenciesFinder):
    def _update_hash(self, func: JITCallable) -> None:
        self.hasher.update(code(func).encode())


def launches_of(op: Op, **given: Any) -> list[Launch]:
    """The launches of one call of the public function, its tensors on ``meta``."""
    given = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in given.items()}
    with patch.object(Op, "__call__", lambda self, *args: args):
        *args, _ = getattr(fastsd_kernels, op.name)(**given)
    launches = op.backends["triton"].module.launches
    bound = dict(zip(inspect.signature(launches).parameters, args, strict=True))
    if isinstance(bound.get("padding"), int):
        bound["padding"] = [bound["padding"]] * 4  # as torch does before an op sees it
    steps = launches(**bound)[1]
    return [step for step in steps if hasattr(step, "kernel")]  # agents' attention is a step of torch's


def gate(op: str, launch: Launch, variant: str, **limits: Any) -> Gate:
    return Gate(op, Triton(launch), launch.kernel.__name__, variant, **limits)


def compiling(op: str, variant: str, launches: Iterable[Launch], targets: tuple[str, ...] = TARGETS) -> Iterator[Gate]:
    """Gates of kernels that only have to compile, with shared memory that a block may have."""
    for number, launch in enumerate(launches, start=1):
        limits: dict[str, Any] = {"stack_bytes": None, "forbidden": (), "targets": targets}
        yield gate(op, launch, f"{variant} step {number}", **limits)
