"""The plan of a compression: what is taken out of a U-Net, and what is made of the rest."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fastsd.gri import GRI

ROUTINGS = ("sigmoid", "softmax")
# What of a U-Net can be taken out; the paths of the model that is compressed
_REMOVABLE = re.compile(
    r"mid_block|(?:down|up)_blocks\.\d{1,3}"
    r"|down_blocks\.\d{1,3}\.downsamplers"
    r"|(?:mid_block|(?:down|up)_blocks\.\d{1,3})\.(?:resnets|attentions)\.\d{1,3}"
    r"|(?:mid_block|(?:down|up)_blocks\.\d{1,3})\.attentions\.\d{1,3}\.transformer_blocks\.\d{1,3}"
)
_RESNET = re.compile(r"(?:mid_block|(?:down|up)_blocks\.\d{1,3})\.resnets\.\d{1,3}")
_CONVOLUTION = re.compile(_RESNET.pattern + r"\.conv[12]")


class PlanError(ValueError):
    """A plan that cannot be made, or not of this model; the message says what was expected and what was given."""


@dataclass(frozen=True)
class Plan:
    """What :func:`fastsd.compress` does to a U-Net. Paths are those of the model that is given to it.

    Args:
        removed: modules that are taken out. A residual block of a down-block goes with the skip connection that it
            makes, one of an up-block with the one that it takes, so a level loses as many of each. A residual block
            goes with the transformer behind it; a transformer (``attentions.N``) or one of its blocks
            (``transformer_blocks.N``) may go alone. ``mid_block`` goes as a whole or in parts; the deepest level goes
            with the downsampler above it.
        bypassed: residual blocks that pass their input on, through their shortcut where they have one. Skip
            connections stay as they are.
        experts: for a convolution ``….resnets.N.conv1`` or ``conv2`` that stays, the convolutions whose kernels it
            may mix with its own from now on: it becomes a :class:`fastsd.CondConv2d`.
        routing: of those, ``"sigmoid"`` or ``"softmax"``.
        gri: what :func:`fastsd.patch` puts in the place of self-attentions of the compressed model, unless it is told
            otherwise; ``None`` for nothing.
        name: of the recipe that it comes from.

    Raises:
        PlanError: something that no U-Net has at such a place, or a path named twice.
    """

    removed: tuple[str, ...] = ()
    bypassed: tuple[str, ...] = ()
    experts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    routing: str = "sigmoid"
    gri: GRI | None = None
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "removed", _paths("removed", self.removed, _REMOVABLE))
        object.__setattr__(self, "bypassed", _paths("bypassed", self.bypassed, _RESNET))
        if not isinstance(self.experts, Mapping):
            raise PlanError(f"experts: expected the kernels of each convolution, by its path; got {self.experts!r}")
        _paths("experts", tuple(self.experts), _CONVOLUTION)
        experts = {path: _paths(f"experts[{path!r}]", of, _CONVOLUTION) for path, of in self.experts.items()}
        object.__setattr__(self, "experts", experts)
        for path in self.bypassed:
            if path in self.removed:
                raise PlanError(f"bypassed: expected none that is removed; got {path!r} in both")
        if self.routing not in ROUTINGS:
            raise PlanError(f"routing: expected one of {', '.join(ROUTINGS)}; got {self.routing!r}")
        if self.gri is not None and not isinstance(self.gri, GRI):
            raise PlanError(f"gri: expected a fastsd.GRI, or None; got {type(self.gri).__name__}")
        if not isinstance(self.name, str):
            raise PlanError(f"name: expected a string; got {self.name!r}")

    def __hash__(self) -> int:
        return hash((self.removed, self.bypassed, tuple(self.experts.items()), self.routing, self.gri, self.name))

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON can hold it; :meth:`from_dict` reads it."""
        return {
            "removed": list(self.removed),
            "bypassed": list(self.bypassed),
            "experts": {path: list(of) for path, of in self.experts.items()},
            "routing": self.routing,
            "gri": None if self.gri is None else asdict(self.gri) | {"levels": list(self.gri.levels)},
            "name": self.name,
        }

    @classmethod
    def from_dict(cls, data: Any) -> "Plan":
        """The plan of :meth:`to_dict`.

        Raises:
            PlanError: other keys, or a value that is none of theirs.
        """
        check_keys("plan", data, [f.name for f in fields(cls)])
        gri = data["gri"]
        if gri is not None:
            check_keys("gri", gri, [f.name for f in fields(GRI)])
            try:
                given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in gri.items()}
                gri = GRI(**given)
            except ValueError as error:
                raise PlanError(f"gri: {error}") from None
        return cls(**{**data, "gri": gri})


def check_keys(name: str, data: Any, expected: Sequence[str]) -> None:
    if not isinstance(data, dict) or set(data) != set(expected):
        given = ", ".join(map(str, data)) if isinstance(data, dict) else type(data).__name__
        raise PlanError(f"{name}: expected an object with the keys {', '.join(expected)}; got {given}")


def _paths(name: str, paths: Any, pattern: re.Pattern[str]) -> tuple[str, ...]:
    if isinstance(paths, str) or not isinstance(paths, Sequence):
        raise PlanError(f"{name}: expected a list of paths; got {paths!r}")
    for path in paths:
        if not isinstance(path, str) or not pattern.fullmatch(path):
            raise PlanError(f"{name}: expected paths such as {_EXAMPLES[pattern]}; got {path!r}")
        if list(paths).count(path) > 1:
            raise PlanError(f"{name}: expected each path once; got {path!r} twice")
    return tuple(paths)


_EXAMPLES = {
    _REMOVABLE: "'down_blocks.0.resnets.1' or 'mid_block'",
    _RESNET: "'down_blocks.0.resnets.1'",
    _CONVOLUTION: "'down_blocks.0.resnets.0.conv1'",
}
