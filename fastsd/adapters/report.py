"""What of an adapter a pruned U-Net takes."""

from dataclasses import dataclass

_SHOWN = 3


@dataclass(frozen=True)
class FitReport:
    """What of an adapter is used, and what is skipped; ``str()`` says it in a sentence.

    Attributes:
        adapter: what was fitted, such as ``"LoRA"``.
        used: places of the full model for which the adapter has something, and which the U-Net still has.
        skipped: those that the U-Net does not have any more.
    """

    adapter: str
    used: tuple[str, ...]
    skipped: tuple[str, ...]

    def __str__(self) -> str:
        total = len(self.used) + len(self.skipped)
        if not self.skipped:
            return f"{self.adapter}: all {total} places are used"
        shown = ", ".join(self.skipped[:_SHOWN])
        more = f" and {len(self.skipped) - _SHOWN} more" if len(self.skipped) > _SHOWN else ""
        return (
            f"{self.adapter}: {len(self.used)} of {total} places are used; this U-Net does not have the others, which "
            f"are skipped: {shown}{more}"
        )
