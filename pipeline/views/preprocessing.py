"""How a model wants its pixels."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Interpolation = Literal["bilinear", "bicubic", "nearest"]


@dataclass(frozen=True)
class Preprocessing:
    """How a model wants its pixels.

    View 0 is the shorter side resized to floor(size / crop_ratio) pixels, then a centre crop of
    `size`; mean and std are those of pixels in [0, 1], by channel.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_ratio: float

    def record(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Preprocessing":
        """Back from `record`."""
        return cls(**{**record, "mean": tuple(record["mean"]), "std": tuple(record["std"])})


IMAGENET = Preprocessing(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear", 0.875)
