"""Score: one number that a protocol hands over, with all that a page needs to show it."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from compress_ssl.pipeline.runtime.records import JsonObject

_PARTS = re.compile(r"(\D*)(\d*)")  # text and the number after it, again and again
SLACK = 1e-4  # of a range: how far rounding may carry a score past its ends


@dataclass(frozen=True)
class Score:
    """One number of a protocol. The report, the comparison and the summary line show what it says of itself.

    Pages show scores with one decimal, so choose a unit in which that is enough, such as percent.
    Raises ValueError for a value that is not finite or outside its range.
    """

    key: str  # unique within the result: "top1"; evaluations name it with the protocol's entry before it, "nn.top1"
    title: str  # unique within an evaluation, and short, because it heads a column: "NN", "kNN 20"
    value: float
    note: str = ""  # what the number is, in words: shown below the title, and once below a comparison
    term: str = ""  # the word of the title that the note explains; "" for the whole title
    detail: str = ""  # what is particular to this evaluation, such as "centre-crop features": shown after the note
    unit: str = "%"
    range: tuple[float, float] = (0.0, 100.0)  # the lowest and the highest value that are possible
    best: Literal["highest", "lowest"] = "highest"
    plotted: bool = False  # whether a comparison draws it against the number of parameters
    options: JsonObject = field(default_factory=dict)  # of the protocol; filled in when the result is kept

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", float(self.value))  # a float of numpy would not be JSON
        low, high = self.range
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"score {self.key!r} has the range {low} to {high}; give two numbers, the lower one first")
        if not math.isfinite(self.value):
            raise ValueError(f"score {self.key!r} is {self.value}, not a finite number; leave out what has no value")
        slack = SLACK * (high - low)
        if not low - slack <= self.value <= high + slack:
            raise ValueError(
                f"score {self.key!r} is {self.value}, outside {low:g} to {high:g}; give the range that it has"
            )
        for name in ("key", "title"):
            if not getattr(self, name).strip():
                raise ValueError(f"a score has an empty {name}; every score needs both a key and a title")
            if len(getattr(self, name).splitlines()) > 1:
                raise ValueError(f"the {name} {getattr(self, name)!r} of a score must be one line: it heads a column")

    @property
    def explained(self) -> str:
        """The word of the title that the note is about."""
        return self.term or self.title

    @property
    def suffix(self) -> str:
        """The unit as it follows the number, " s"; "" for percent, which is not written, and without a unit."""
        return "" if self.unit in ("", "%") else f" {self.unit}"

    @property
    def description(self) -> str:
        """The note and, in brackets, the detail."""
        if not (self.note and self.detail):
            return self.note or self.detail
        return f"{self.note} ({self.detail})"

    def fraction(self, value: float) -> float:
        """Where a value lies on this score's bar, 0 to 1. The bar begins at 0 if the range has both signs."""
        low, high = self.range
        start = low if low > 0 or high <= 0 else 0.0
        return min(max((value - start) / (high - start), 0.0), 1.0)


def sort_naturally(scores: Iterable[Score]) -> list[Score]:
    """Scores in the order of their keys, in which a number counts as a number: "5" before "20"."""
    return sorted(scores, key=lambda score: [(int(n or -1), text) for text, n in _PARTS.findall(score.key)])
