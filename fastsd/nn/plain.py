"""Whether a submodule may be read through instead of called.

A fast forward that takes ``norm1.weight`` and never calls ``norm1`` would skip whatever else that call does:
hooks, an offloading or casting wrapper, an adapter, a quantised weight. Only a plain leaf may be skipped, and a
fast forward asks every time, so that what is put on a patched model later is kept too.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

_KNOWN: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Dropout, nn.GroupNorm, nn.LayerNorm, nn.Linear, nn.SiLU)
_FORWARDS = {cls: cls.forward for cls in _KNOWN}

# functional_call puts plain tensors in the place of parameters, torch.export puts fake ones
PLAIN = (nn.Parameter, Tensor, FakeTensor)


def why_not_plain(owner: nn.Module, name: str, expected: type[nn.Module]) -> str | None:
    """Why ``owner.<name>`` has to be called, as a sentence; ``None`` where it may be read through.

    Args:
        owner: the module that would skip the call.
        name: the attribute of the leaf.
        expected: the leaf's exact type.
    """
    leaf = getattr(owner, name)
    if type(leaf) is not expected:
        return f"{name} is a {type(leaf).__module__}.{type(leaf).__qualname__}, expected a plain {expected.__name__}"
    if is_overwritten(expected):
        return f"{expected.__name__}.forward has been overwritten by {expected.forward.__module__}"
    if leaf._forward_hooks or leaf._forward_pre_hooks:
        return f"{name} has a forward hook, which runs only when {name} is called"
    if leaf._backward_hooks or leaf._backward_pre_hooks:
        return f"{name} has a backward hook, which runs only when {name} is called"
    if "forward" in leaf.__dict__ and not is_method_of(leaf.__dict__["forward"], leaf, expected):
        return f"{name} has an instance forward (an offloading or casting hook?), which runs only when it is called"
    if leaf._compiled_call_impl is not None:
        return f"{name} is compiled by itself, which counts only when it is called"
    for key, parameter in leaf._parameters.items():
        if parameter is None:
            continue
        if type(parameter) not in PLAIN:
            return f"{name}.{key} is a {type(parameter).__qualname__}, expected a plain Parameter"
        if parameter.layout is not torch.strided:
            return f"{name}.{key} is {parameter.layout}, expected a dense tensor"
        if not torch.compiler.is_compiling() and parameter.untyped_storage().nbytes() == 0 < parameter.numel():
            return f"the memory of {name}.{key} has been freed"
    return None


def is_overwritten(cls: type[Any], name: str = "forward") -> bool:
    """Whether somebody has put a function of their own in the place of a class's method."""
    if name == "forward" and cls in _FORWARDS:
        return cls.forward is not _FORWARDS[cls]
    owner = next(base for base in cls.__mro__ if name in vars(base))
    return vars(owner)[name].__module__ != owner.__module__


def remember(cls: type[nn.Module]) -> None:
    """Let :func:`is_overwritten` compare with the ``forward`` that ``cls`` has now, as compilers can."""
    if not is_overwritten(cls):
        _FORWARDS[cls] = cls.forward


def is_idle(owner: nn.Module, name: str) -> bool:
    """Whether the dropout ``owner.<name>`` passes everything through, so that it need not be called."""
    dropout = getattr(owner, name)
    return why_not_plain(owner, name, nn.Dropout) is None and (dropout.p == 0 or not dropout.training)


def is_method_of(forward: object, module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether ``forward`` is ``cls.forward`` bound to ``module``: what a removed hook leaves on an instance."""
    return getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) is cls.forward


def why_stock_everywhere() -> str | None:
    """Why every module has to run its stock forward just now, as a sentence; ``None`` where none has to."""
    if (
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    ):
        return "a hook on all modules is registered, which runs only for those that are called"
    if is_transformed():
        return "a torch.func transform or forward-mode differentiation is active, which the ops do not offer"
    return None


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is active, which the ops do not offer."""
    # a compiler traces through the transforms itself
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    )
