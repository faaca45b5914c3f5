"""What `moehive bench faults` found."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultRow:
    """One figure, measured once or several times; each time has its own goal, or none has."""

    what: str
    seconds: bool = True  # else a ratio
    values: Sequence[float]
    goals: Sequence[float] = ()
    note: str = ""

    def figures(self) -> dict[str, Any]:
        """As JSON has it: median, worst, the median of the goals, and whether each time its goal was met."""
        return {
            "what": self.what,
            "seconds" if self.seconds else "ratio": round(median(self.values), 4),
            "worst": round(max(self.values), 4),
            "times": len(self.values),
            "goal": round(median(self.goals), 4) if self.goals else None,
            "met": all(v <= g for v, g in zip(self.values, self.goals, strict=True)) if self.goals else None,
            "note": self.note,
        }


@dataclass(slots=True)
class FaultsReport:
    """All rows, and whether the texts that were read meanwhile were those of a calm cluster."""

    rows: list[FaultRow] = field(default_factory=list)
    texts: int = 0  # that were read, wholly or in part
    differ: int = 0  # that had another token than the calm one, or one too many or too few
    errors: list[str] = field(default_factory=list)  # of texts that ended with a sentence

    def figures(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "rows": [row.figures() for row in self.rows],
            "texts": self.texts,
            "differ": self.differ,
            "failed": len(self.errors),
            "errors": self.errors[:10],
        }
