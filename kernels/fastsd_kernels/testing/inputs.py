"""Input generators: the awkward tensors that users bring, each with a name."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """Arguments of one call of an op's public function, all by keyword.

    ``relative_l2`` is set where the contract allows that much beside float64, whatever plain PyTorch's error is.
    """

    name: str
    kwargs: dict[str, Any]
    relative_l2: float | None = None

    def __str__(self) -> str:
        return self.name

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> "Sample":
        """The same call with ``function`` applied to every floating-point tensor."""
        return Sample(
            self.name,
            {
                name: function(value) if isinstance(value, Tensor) and value.is_floating_point() else value
                for name, value in self.kwargs.items()
            },
            self.relative_l2,
        )

    def requiring_grad(self) -> "Sample":
        """The same call on detached leaves that want a gradient, strides kept where no two elements overlap."""
        return self.map_tensors(lambda t: t.detach().clone(memory_format=torch.preserve_format).requires_grad_())


@dataclass(frozen=True)
class BadSample:
    """A call that must raise ``error`` with a message that contains every one of ``says``."""

    name: str
    kwargs: dict[str, Any]
    error: type[Exception]
    says: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


def named(samples: Iterable[Sample], name: str) -> Sample:
    """The one of ``samples`` that has this name."""
    return next(sample for sample in samples if sample.name == name)


def random_tensor(shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Standard normal values that are the same on every device; drawn on the CPU in float32."""
    generator = torch.Generator().manual_seed(seed + 7919 * len(shape) + sum(shape))
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)


def _channels_last(shape: tuple[int, ...], **like: Any) -> Tensor:
    batch, channels, *spatial = shape
    return random_tensor((batch, *spatial, channels), **like).movedim(-1, 1)


def _storage_offset(shape: tuple[int, ...], **like: Any) -> Tensor:
    return random_tensor((math.prod(shape) + 1,), **like)[1:].view(shape)


def _channels_last_offset(shape: tuple[int, ...], **like: Any) -> Tensor:
    batch, channels, *spatial = shape
    return _storage_offset((batch, *spatial, channels), **like).movedim(-1, 1)


def _sliced_channels(shape: tuple[int, ...], **like: Any) -> Tensor:
    batch, channels, *spatial = shape
    return random_tensor((batch, channels + 3, *spatial), **like)[:, 2:-1]


def _channels_last_sliced(shape: tuple[int, ...], **like: Any) -> Tensor:
    batch, channels, *spatial = shape
    return _channels_last((batch, channels + 3, *spatial), **like)[:, 2:-1]


def _sliced_space(shape: tuple[int, ...], **like: Any) -> Tensor:
    return random_tensor((*shape[:-1], 2 * shape[-1] + 1), **like)[..., 1::2]


def _expanded_batch(shape: tuple[int, ...], **like: Any) -> Tensor:
    return random_tensor((1, *shape[1:]), **like).expand(shape)


def _expanded_space(shape: tuple[int, ...], **like: Any) -> Tensor:
    return random_tensor((*shape[:-1], 1), **like).expand(shape)


def _transposed(shape: tuple[int, ...], **like: Any) -> Tensor:
    return random_tensor((*shape[:-2], shape[-1], shape[-2]), **like).transpose(-1, -2)


_LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "contiguous": random_tensor,
    "channels_last": _channels_last,
    "storage_offset": _storage_offset,
    "channels_last_offset": _channels_last_offset,
    "sliced_channels": _sliced_channels,
    "channels_last_sliced": _channels_last_sliced,
    "sliced_space": _sliced_space,
    "expanded_batch": _expanded_batch,
    "expanded_space": _expanded_space,
    "transposed": _transposed,
}


def feature_map(shape: tuple[int, ...], layout: str, **like: Any) -> Tensor:
    """A random map ``[B, C, *spatial]`` in one of the layouts below; ``like``: device, dtype, seed."""
    return _LAYOUTS[layout](shape, **like)


def feature_maps(shape: tuple[int, ...], **like: Any) -> Iterator[tuple[str, Tensor]]:
    """The same shape in every layout: dense, channels_last, sliced, expanded, transposed, off the alignment."""
    for layout in _LAYOUTS:
        yield layout, feature_map(shape, layout, **like)
