"""Triton kernels compiled ahead of time, without a GPU, exactly as they would be compiled at their launch.

The kernels must be real ones: a process where ``TRITON_INTERPRET=1`` was set at import has none.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

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


def compile(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    divisible_by_16: Collection[str],
    num_warps: int,
    num_stages: int = 3,
    target: str = "sm_80",
) -> bytes:
    """The cubin of ``kernel`` for ``target``, ``"sm_80"``, ``"sm_90a"`` or ``"sm_100a"``."""
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible_by_16}
    compiled = triton.compile(
        ASTSource(kernel, dict(signature), dict(constants), attributes),
        target=GPUTarget("cuda", _CAPABILITIES[target], 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    return compiled.asm["cubin"]


def compile_launch(launch: Launch, target: str) -> bytes:
    """The cubin that ``launch`` would run on ``target``."""
    return compile(launch.kernel, *specialise(launch.kernel, launch.args), launch.num_warps, target=target)
