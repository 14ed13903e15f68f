"""Keys and values of a text, kept from step to step of a loop whose steps all read the same text.

They are used again only where text, weights and biases hold, bit by bit, what they were made from, however they were
edited since. Reading the weights for that takes a small part of the time of multiplying with them.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsd.nn.linear import project
from fastsd.nn.plain import why_not_plain
from fastsd.nn.replacement import settings_of
from fastsd_kernels.conv2d import cpu_impl
from fastsd_kernels.digest import digest
from fastsd_kernels.dispatch import ENVIRONMENT_VARIABLE
from fastsd_kernels.linear import cpu_speed

# a step may read two texts one after the other: what is wanted, and what is not
MOST_TEXTS = 2

# keys and values of a text, relative to the weights that they are made with, or in bytes: a batch of frames makes more
LARGEST, LARGEST_BYTES = 1 / 2, 2**20


@dataclass(frozen=True)
class _Kept:
    """Keys and values of a text, and digests of all that they were made from; of a text seen once its digest alone."""

    text: tuple[Any, ...]
    weights: tuple[Any, ...] | None = None
    made: tuple[Tensor, ...] = ()


def keys_and_values(
    owner: nn.Module, attn: Any, text: Tensor, is_packed: bool = False
) -> tuple[Tensor, ...]:  # [B, M, C'] to [B, M, C] twice
    """``attn.to_k(text)`` and ``attn.to_v(text)``, which nobody may write to; from the second time on they are kept.

    In inference on a CPU, outside autocast: what replaced attention asks before it projects.

    Args:
        owner: the replaced module whose settings apply, and which keeps them.
        is_packed: both are halves of ``attn.to_kv(text)``.
    """
    names = ("to_kv",) if is_packed else ("to_k", "to_v")
    made = _kept_or_made(owner, attn, names, text)
    return made[0].chunk(2, dim=-1) if is_packed else made


def _kept_or_made(owner: nn.Module, attn: Any, names: tuple[str, ...], text: Tensor) -> tuple[Tensor, ...]:
    settings = settings_of(owner)
    seen = digest(text) if _is_repeatable(attn, names) and _is_small(attn, names, text) else None
    if settings is None or seen is None:
        return _project(owner, attn, names, text)
    texts: tuple[_Kept, ...] = settings.kept.get("texts", ())
    kept = next((earlier for earlier in texts if earlier.text == seen), None)
    kept = _Kept(seen) if kept is None else _up_to_date(kept, owner, attn, names, text)
    # what another thread has is never changed, only replaced
    settings.kept["texts"] = (kept, *(other for other in texts if other.text != seen))[:MOST_TEXTS]
    return kept.made or _project(owner, attn, names, text)


def _project(owner: nn.Module, attn: Any, names: tuple[str, ...], text: Tensor) -> tuple[Tensor, ...]:
    return tuple(project(owner, attn, name, text) for name in names)


def _is_repeatable(attn: Any, names: tuple[str, ...]) -> bool:
    """Whether the projections need not be called, and depend on a text's numbers and their own alone."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not cpu_speed.is_dispatched_elsewhere()
        and ENVIRONMENT_VARIABLE not in os.environ  # which may name another backend at any time
        and cpu_impl.is_plain_float32()
        and attn.norm_k is None  # which could write to them
        and all(why_not_plain(attn, name, nn.Linear) is None for name in names)
    )


def _up_to_date(kept: _Kept, owner: nn.Module, attn: Any, names: tuple[str, ...], text: Tensor) -> _Kept:
    weights = _digests(attn, names)
    if weights is None:
        return _Kept(kept.text)
    if weights == kept.weights:
        return kept
    # tensors that are good in inference mode and outside of it
    with torch.inference_mode(False), torch.no_grad():
        made = _project(owner, attn, names, text)
    # another thread may have edited something meanwhile
    is_same = (digest(text), _digests(attn, names)) == (kept.text, weights)
    return _Kept(kept.text, weights, made) if is_same else _Kept(kept.text)


def _is_small(attn: Any, names: tuple[str, ...], text: Tensor) -> bool:
    """Whether keys and values take no more memory than they may."""
    layers = [getattr(attn, name) for name in names]
    made = text.shape[0] * text.shape[1] * sum(layer.out_features for layer in layers) * text.element_size()
    return made <= max(LARGEST * sum(layer.weight.nbytes for layer in layers), LARGEST_BYTES)


def _digests(attn: Any, names: tuple[str, ...]) -> tuple[Any, ...] | None:
    """Of weights and biases; ``None`` where one has none."""
    layers = [getattr(attn, name) for name in names]
    digests = tuple(() if p is None else digest(p) for layer in layers for p in (layer.weight, layer.bias))
    return None if None in digests else digests
