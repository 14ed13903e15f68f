"""The gradient of an op, for ops that have none of their own: its reference's, by torch's autograd."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def gradient_of(
    reference: Callable[..., Tensor],
    fused: Callable[..., tuple[Tensor | None, ...] | None] = lambda grad, backend, *inputs: None,
) -> tuple[Callable[..., None], Callable[..., tuple[Any, ...]]]:
    """``setup_context`` and ``backward`` for :class:`fastsd_kernels.dispatch.Op`.

    The backward pass evaluates ``reference`` again, on the saved inputs, and differentiates that; where the gradient
    is itself to be differentiated, through the same graph. First it asks ``fused`` for the gradients to the inputs, of
    a call with this ``backend``, but for compilers, batched and second gradients; ``None`` where it has none.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
        ctx.others = [None if isinstance(value, Tensor) else (value,) for value in inputs]

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        again = torch.is_grad_enabled()
        tensors = ctx.saved_tensors  # once: a checkpoint gives them away
        if not again and _has_storage(grad):
            saved = iter(tensors)
            gradients = fused(grad, ctx.backend, *(next(saved) if other is None else other[0] for other in ctx.others))
            if gradients is not None:
                return gradients
        saved = iter(tensors)
        # torch leaves trailing arguments that equal their default out of the call
        wants = [*ctx.needs_input_grad, *[False] * len(ctx.others)][: len(ctx.others)]
        # the forward has run in the dtypes that its inputs have
        with torch.enable_grad(), _without_autocast(grad.device.type):
            inputs = []
            for other, wanted in zip(ctx.others, wants, strict=True):
                if other is not None:
                    inputs.append(other[0])
                    continue
                value = next(saved)
                # a view keeps the graph behind it, and is a place to stop at
                inputs.append(value.view_as(value) if again else value.detach().requires_grad_(wanted))
            output = reference(*inputs)
            places = [i for i, wanted in enumerate(wants) if wanted]
            # an input that has no part in the result has a gradient of zeros
            grads = torch.autograd.grad(
                output, [inputs[i] for i in places], grad, create_graph=again, allow_unused=True, materialize_grads=True
            )
        result: list[Tensor | None] = [None] * len(inputs)
        for place, value in zip(places, grads, strict=True):
            result[place] = value
        return tuple(result)

    return setup_context, backward


def _has_storage(grad: Tensor) -> bool:
    """Whether a kernel can read it: not for compilers, nor what stands for a batch of gradients."""
    of_functorch = torch._C._functorch
    is_wrapped = of_functorch.is_functorch_wrapped_tensor(grad) or of_functorch.is_legacy_batchedtensor(grad)
    return type(grad) is Tensor and not is_wrapped


def _without_autocast(device_type: str) -> AbstractContextManager[None]:
    on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else nullcontext()
