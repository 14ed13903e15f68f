"""What a plan makes of a U-Net's structure: the next configuration, where each weight comes from, and what is left.

As much as stock diffusers can say is said in the configuration; what it cannot is a list of :class:`Edits`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastsd.compress.configuration import Config, arguments_of
from fastsd.compress.plan import Plan, PlanError

# of two configurations that differ in it, the one for the levels that are left
_BY_LEVEL = (
    "block_out_channels",
    "attention_head_dim",
    "cross_attention_dim",
    "only_cross_attention",
    "num_attention_heads",
)
_OF_ATTENTION = ("attention_head_dim", "cross_attention_dim", "num_attention_heads")
_DOWN_TYPES = {
    "DownBlock2D": "DownBlock2D",
    "CrossAttnDownBlock2D": "DownBlock2D",
}  # each and the one without attention
_UP_TYPES = {"UpBlock2D": "UpBlock2D", "CrossAttnUpBlock2D": "UpBlock2D"}
_MID_TYPES = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)


def layers_of(config: Config) -> list[int]:
    """Residual blocks of each down-block; an up-block has one more."""
    layers, levels = config["layers_per_block"], len(config["down_block_types"])
    return [layers] * levels if isinstance(layers, int) else list(layers)


def transformers_of(config: Config) -> tuple[list[list[int]], list[list[int]]]:
    """Blocks of each transformer of each down-block and up-block; none where a block has no transformers."""
    layers = layers_of(config)
    per_level, reverse = config["transformer_layers_per_block"], config["reverse_transformer_layers_per_block"]
    per_level = [per_level] * len(layers) if isinstance(per_level, int) else list(per_level)
    reverse = per_level[::-1] if reverse is None else reverse

    def of(types: Sequence[str], counts: Sequence[Any], layers: Sequence[int]) -> list[list[int]]:
        return [
            ([count] * n if isinstance(count, int) else list(count)) if "CrossAttn" in kind else []
            for kind, count, n in zip(types, counts, layers, strict=True)
        ]

    up_layers = [n + 1 for n in layers[::-1]]
    return of(config["down_block_types"], per_level, layers), of(config["up_block_types"], reverse, up_layers)


@dataclass(frozen=True)
class Edits:
    """What is changed in a model that stock diffusers has built; paths are that model's.

    Attributes:
        skipped: residual blocks and transformers in whose place something stands that passes the map on.
        shortened: transformers, and how many of their blocks stay.
        experts: convolutions that become a CondConv2d, and how many further kernels each gets.
    """

    skipped: tuple[str, ...]
    shortened: Mapping[str, int]
    experts: Mapping[str, int]

    def __bool__(self) -> bool:
        return bool(self.skipped or self.shortened or self.experts)


@dataclass(frozen=True)
class Structure:
    """A compressed U-Net before it has weights.

    Attributes:
        config: of the stock model that it is, or is made from by ``edits``.
        edits: what the configuration does not say.
        sources: where the module at a path of the new model is in the given one; longer paths go with their
            beginnings, and what is not named is where it was.
        expert_sources: for each convolution that mixes kernels, where these are in the given model, its own first.
    """

    config: dict[str, Any]
    edits: Edits
    sources: Mapping[str, str]
    expert_sources: Mapping[str, tuple[str, ...]]

    @property
    def is_stock(self) -> bool:
        return not self.edits

    def source_of(self, path: str) -> str:
        """Where a module or tensor of the new model is in the given one."""
        parts = path.split(".")
        for end in range(len(parts), 0, -1):
            source = self.sources.get(".".join(parts[:end]))
            if source is not None:
                return ".".join([source, *parts[end:]])
        return path


def structure_of(config: Config, plan: Plan) -> Structure:
    """What ``plan`` makes of a ``UNet2DConditionModel`` with this configuration.

    Raises:
        PlanError: the plan names something that the model has not, or takes out what the rest cannot do without.
    """
    return _Planning(config, plan).structure()


class _Planning:
    def __init__(self, config: Config, plan: Plan) -> None:
        self.config, self.plan = dict(config), plan
        self.removed = frozenset(plan.removed)
        self.layers = layers_of(config)
        self.down, self.up = transformers_of(config)
        self.levels = len(self.layers)
        self._check_types()
        self._check_paths()
        self.left = self._levels_left()

    def _check_types(self) -> None:
        for key, known in (("down_block_types", _DOWN_TYPES), ("up_block_types", _UP_TYPES)):
            other = [kind for kind in self.config[key] if kind not in known]
            if other and (self.plan.removed or self.plan.bypassed):
                raise PlanError(f"{key}: expected blocks of the types {', '.join(known)}; got {', '.join(other)}")
        if self.config["mid_block_type"] not in _MID_TYPES:
            names = ", ".join(map(str, _MID_TYPES))
            raise PlanError(f"mid_block_type: expected one of {names}; got {self.config['mid_block_type']!r}")

    def _check_paths(self) -> None:
        there = set(self._paths())
        sources = [conv for of in self.plan.experts.values() for conv in of]
        for name, paths in (
            ("removed", self.plan.removed),
            ("bypassed", self.plan.bypassed),
            ("experts", [conv.rpartition(".")[0] for conv in (*self.plan.experts, *sources)]),
        ):
            for path in paths:
                if path not in there:
                    raise PlanError(f"{name}: expected modules of the model; it has no {path!r}")

    def _paths(self) -> list[str]:
        """Everything that a plan for this model can name."""
        found = []
        for blocks, counts, layers in (
            ("down_blocks", self.down, self.layers),
            ("up_blocks", self.up, [n + 1 for n in self.layers[::-1]]),
        ):
            for level, (transformers, n) in enumerate(zip(counts, layers, strict=True)):
                place = f"{blocks}.{level}"
                found += [place, *(f"{place}.resnets.{layer}" for layer in range(n))]
                for layer, count in enumerate(transformers):
                    found.append(f"{place}.attentions.{layer}")
                    found += [f"{place}.attentions.{layer}.transformer_blocks.{k}" for k in range(count)]
                if blocks == "down_blocks" and level < len(counts) - 1:
                    found.append(f"{place}.downsamplers")
        if self.config["mid_block_type"] is not None:
            found += ["mid_block", "mid_block.resnets.0"]
        if self.config["mid_block_type"] == "UNetMidBlock2DCrossAttn":
            found += ["mid_block.attentions.0", "mid_block.resnets.1"]
            found += [f"mid_block.attentions.0.transformer_blocks.{k}" for k in range(self._mid_count(self.down))]
        return found

    def _mid_count(self, down: Sequence[Sequence[int]]) -> int:
        """Blocks that stock gives the transformer of the mid block: as many as the first of the deepest level."""
        if down[-1]:
            return down[-1][0]
        deepest = self.config["transformer_layers_per_block"]
        deepest = deepest if isinstance(deepest, int) else deepest[len(down) - 1]
        return deepest if isinstance(deepest, int) else deepest[0]

    def _levels_left(self) -> int:
        """How many levels stay; the others go from the deepest on, each with its parts."""
        left = self.levels
        while left > 1 and f"down_blocks.{left - 1}" in self.removed:
            left -= 1
        gone = range(left, self.levels)
        expected = {f"down_blocks.{level}" for level in gone} | {
            f"up_blocks.{self.levels - 1 - level}" for level in gone
        }
        if gone:
            expected.add(f"down_blocks.{left - 1}.downsamplers")
        whole = {path for path in self.removed if re.fullmatch(r"(down|up)_blocks\.\d+(\.downsamplers)?", path)}
        if whole != expected:
            lacking = ", ".join(sorted(expected - whole)) or "nothing else"
            over = ", ".join(sorted(whole - expected)) or "nothing"
            raise PlanError(
                "removed: expected whole levels from the deepest on, each with its down-block, its up-block and the "
                f"downsampler above; lacking: {lacking}; not to be removed without: {over}"
            )
        return left

    def structure(self) -> Structure:
        sources: dict[str, str] = {}
        skipped: list[str] = []
        kept: dict[str, list[list[int]]] = {"down_blocks": [], "up_blocks": []}  # layers of each block
        counts: dict[str, list[list[int]]] = {"down_blocks": [], "up_blocks": []}  # blocks of each transformer
        kinds: dict[str, list[str]] = {"down_blocks": [], "up_blocks": []}
        offset = self.levels - self.left
        for blocks, first, transformers, types in (
            ("down_blocks", 0, self.down, _DOWN_TYPES),
            ("up_blocks", offset, self.up, _UP_TYPES),
        ):
            for index in range(self.left):
                old, new = f"{blocks}.{first + index}", f"{blocks}.{index}"
                sources[new] = old
                kind = self.config["down_block_types" if blocks == "down_blocks" else "up_block_types"][first + index]
                of = transformers[first + index]
                layers = self._kept_layers(old, blocks, first + index, bool(of))
                gone = [layer for layer in layers if of and f"{old}.attentions.{layer}" in self.removed]
                without = bool(of) and len(gone) == len(layers)
                kinds[blocks].append(types[kind] if without else kind)
                kept[blocks].append(layers)
                counts[blocks].append([])
                for place, layer in enumerate(layers):
                    sources[f"{new}.resnets.{place}"] = f"{old}.resnets.{layer}"
                    if not of or without:
                        continue
                    sources[f"{new}.attentions.{place}"] = f"{old}.attentions.{layer}"
                    if layer in gone:
                        # any count will do: something else takes its place
                        skipped.append(f"{new}.attentions.{place}")
                        counts[blocks][-1].append(of[layer])
                    else:
                        counts[blocks][-1].append(
                            self._keep_blocks(
                                f"{new}.attentions.{place}", f"{old}.attentions.{layer}", of[layer], sources
                            )
                        )
        for level in range(self.left):
            down, up = kept["down_blocks"][level], kept["up_blocks"][self.left - 1 - level]
            if not down or len(up) != len(down) + 1:
                raise PlanError(
                    f"removed: expected as many residual blocks of up_blocks.{self.levels - 1 - level} as of "
                    f"down_blocks.{level}, whose skip connections they take, and one of the latter to stay; got "
                    f"{self.layers[level] + 1 - len(up)} and {self.layers[level] - len(down)} (bypassed keeps the "
                    "skip connection of a block)"
                )
        config = self._config(kept, counts, kinds)
        shortened = self._mid_block(config, counts["down_blocks"], sources, skipped)
        new_path = {old: new for new, old in sources.items()}
        for path in self.plan.bypassed:
            skipped.append(self._place_of(path, new_path, "bypassed"))
        experts: dict[str, int] = {}
        expert_sources: dict[str, tuple[str, ...]] = {}
        for conv, others in self.plan.experts.items():
            block, _, name = conv.rpartition(".")
            new_block = self._place_of(block, new_path, "experts")
            if new_block in skipped:
                raise PlanError(f"experts: expected convolutions of blocks that stay; got {conv!r}")
            experts[f"{new_block}.{name}"] = len(others)
            expert_sources[f"{new_block}.{name}"] = (conv, *others)
        return Structure(config, Edits(tuple(skipped), shortened, experts), sources, expert_sources)

    def _place_of(self, path: str, new_path: Mapping[str, str], name: str) -> str:
        place = path if path.startswith("mid_block") else new_path.get(path)
        if place is None or path in self.removed or (path.startswith("mid_block") and "mid_block" in self.removed):
            raise PlanError(f"{name}: expected modules that are not removed; got {path!r}")
        return place

    def _kept_layers(self, old: str, blocks: str, index: int, has_transformers: bool) -> list[int]:
        level = index if blocks == "down_blocks" else self.levels - 1 - index
        total = self.layers[level] + (blocks == "up_blocks")
        layers = [layer for layer in range(total) if f"{old}.resnets.{layer}" not in self.removed]
        for layer in range(total):
            if has_transformers and layer not in layers and f"{old}.attentions.{layer}" not in self.removed:
                raise PlanError(
                    f"removed: expected {old}.attentions.{layer} with {old}.resnets.{layer}, whose result it takes; "
                    "got the latter alone"
                )
        return layers

    def _keep_blocks(self, new: str, old: str, count: int, sources: dict[str, str]) -> int:
        """Notes where the blocks of a transformer that stay come from; returns how many they are."""
        kept = [k for k in range(count) if f"{old}.transformer_blocks.{k}" not in self.removed]
        for place, k in enumerate(kept):
            sources[f"{new}.transformer_blocks.{place}"] = f"{old}.transformer_blocks.{k}"
        return len(kept)

    def _config(
        self, kept: dict[str, list[list[int]]], counts: dict[str, list[list[int]]], kinds: dict[str, list[str]]
    ) -> dict[str, Any]:
        config = arguments_of(self.config)
        config["down_block_types"], config["up_block_types"] = kinds["down_blocks"], kinds["up_blocks"]
        layers = [len(of) for of in kept["down_blocks"]]
        if self.left < self.levels:
            for key in _BY_LEVEL:
                if isinstance(config.get(key), list | tuple):
                    config[key] = list(config[key])[: self.left]
                    self._check_mid_block(key, config[key][-1])
        # what is as it was stays written as it was
        if layers != layers_of(self.config):
            config["layers_per_block"] = layers[0] if len(set(layers)) == 1 else layers
        if (counts["down_blocks"], counts["up_blocks"]) != (self.down, self.up):
            was = self.config["transformer_layers_per_block"]
            was = [was] * self.levels if isinstance(was, int) else list(was)
            down = [_short(of, was[level]) for level, of in enumerate(counts["down_blocks"])]
            reverse = was[::-1][self.levels - self.left :]
            up = [_short(of, reverse[index]) for index, of in enumerate(counts["up_blocks"])]
            uniform = set(map(str, (*down, *up))) == {str(down[0])} and isinstance(down[0], int)
            nested = any(isinstance(of, list) for of in (*down, *up))
            config["transformer_layers_per_block"] = down[0] if uniform else down
            config["reverse_transformer_layers_per_block"] = (
                up if nested or (not uniform and up != down[::-1]) else None
            )
        return config

    def _check_mid_block(self, key: str, deepest: Any) -> None:
        """The attention of the mid block is built as that of the deepest level: the one that is left, from now on."""
        attends = self.config["mid_block_type"] == "UNetMidBlock2DCrossAttn"
        attends = attends and not self.removed & {"mid_block", "mid_block.attentions.0"}
        if attends and key in _OF_ATTENTION and deepest != list(self.config[key])[-1]:
            raise PlanError(
                f"removed: expected mid_block or mid_block.attentions.0 with levels whose {key} differs from that of "
                f"the deepest level left, as which stock diffusers builds the mid block; got {deepest} there and "
                f"{list(self.config[key])[-1]} in the mid block"
            )

    def _mid_block(
        self, config: dict[str, Any], down: list[list[int]], sources: dict[str, str], skipped: list[str]
    ) -> dict[str, int]:
        """Writes the mid block into the configuration, as far as that can say it; returns what it cannot."""
        if config["mid_block_type"] is None:
            return {}
        if "mid_block" in self.removed:
            config["mid_block_type"] = None
            return {}
        removed = {path for path in self.removed if re.fullmatch(r"mid_block\.(resnets|attentions)\.\d+", path)}
        if config["mid_block_type"] == "UNetMidBlock2DCrossAttn" and removed == {
            "mid_block.attentions.0",
            "mid_block.resnets.1",
        }:
            config["mid_block_type"] = "UNetMidBlock2D"
            return {}
        skipped += sorted(removed)
        if config["mid_block_type"] == "UNetMidBlock2D" or "mid_block.attentions.0" in removed:
            return {}
        path = "mid_block.attentions.0"
        wanted = self._keep_blocks(path, path, self._mid_count(self.down), sources)
        deepest = config["transformer_layers_per_block"]
        deepest = deepest if isinstance(deepest, int) else deepest[-1]
        given = deepest if isinstance(deepest, int) else deepest[0]
        if wanted <= given:
            return {} if wanted == given else {path: wanted}
        raise PlanError(
            f"removed: expected no fewer transformer blocks in the deepest level than in the mid block, which stock "
            f"diffusers gives as many; got {given} and {wanted}"
        )


def _short(counts: list[int], otherwise: Any) -> Any:
    """A number where all are alike; where there are none, what stood there."""
    if not counts:
        return otherwise if isinstance(otherwise, int) else 1
    return counts[0] if len(set(counts)) == 1 else list(counts)
