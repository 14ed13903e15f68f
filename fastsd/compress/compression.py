"""What a compressed U-Net was made from: adapters of the full model ask for it, and files keep it."""

from dataclasses import dataclass, fields
from typing import Any

from fastsd.compress.configuration import check_config
from fastsd.compress.plan import Plan, PlanError, check_keys

# Of a stock U-Net's configuration
CONFIG_ENTRY = "_fastsd_compression"
MOST_STEPS = 8


@dataclass(frozen=True)
class Compression:
    """What a compressed model was made from: the configuration of the stock model, and the plan.

    Attributes:
        before: what that model was made from, where that is known and it was not the full one.
    """

    base_config: dict[str, Any]
    plan: Plan
    before: "Compression | None" = None

    @classmethod
    def of(cls, unet: Any) -> "Compression | None":
        """What a U-Net says it was made from; ``None`` where it says nothing.

        A stock U-Net says so in a private entry of its configuration, which stock diffusers passes over, saves and
        loads.

        Raises:
            PlanError: the entry is no compression.
        """
        attribute = getattr(unet, "compression", None)
        if isinstance(attribute, cls):
            return attribute
        entry = unet.config.get(CONFIG_ENTRY)
        return None if entry is None else cls.from_dict(entry)

    def to_dict(self) -> dict[str, Any]:
        """The compression as JSON can hold it; :meth:`from_dict` reads it."""
        return {
            "base_config": self.base_config,
            "plan": self.plan.to_dict(),
            "before": None if self.before is None else self.before.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Any) -> "Compression":
        """The compression of :meth:`to_dict`.

        Raises:
            PlanError: other keys, or a value that is none of theirs.
        """
        chain: list[tuple[dict[str, Any], Plan]] = []
        while data is not None:
            if len(chain) == MOST_STEPS:
                raise PlanError(f"before: expected at most {MOST_STEPS} compressions, one after the other; got more")
            check_keys("compression", data, [f.name for f in fields(cls)])
            check_config(data["base_config"])
            chain.append((data["base_config"], Plan.from_dict(data["plan"])))
            data = data["before"]
        made = None
        for config, plan in reversed(chain):
            made = cls(config, plan, made)
        assert made is not None
        return made
