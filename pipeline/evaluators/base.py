"""What a protocol takes and gives: two splits of features in, metrics and arrays out.

Shapes: n images of a split, d dims, C classes. All accuracies are percentages in [0, 100].
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from compress_ssl.pipeline.evaluators.results import Result
from compress_ssl.pipeline.runtime.artifact import UserError

__all__ = ["Evaluator", "Result", "Split", "per_class", "percent", "require_labels"]


@dataclass(frozen=True, eq=False)
class Split:
    """Features of the usable images of one data set, view 0. Both splits share one class list."""

    features: np.ndarray  # (n, d) float32, raw: every protocol normalises for itself
    label: np.ndarray  # (n,) int64 into `classes`, -1 where there is none
    rows: np.ndarray  # (n,) int64: i, the row in the data set, for drawing the image
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or not len(self.features) == len(self.label) == len(self.rows):
            shapes = self.features.shape, self.label.shape, self.rows.shape
            raise ValueError(f"features, label and rows have shapes {shapes}, not (n, d), (n,), (n,)")

    def __len__(self) -> int:
        return len(self.features)


class Evaluator(Protocol):
    """A protocol with its options. The same splits and options give the same Result.

    One that is made for a single model says so by `of`, the digest of its weights.
    """

    name: ClassVar[str]  # the key in metrics.json
    needs_labels: ClassVar[tuple[str, ...]]  # of which images: "training", "validation"

    def __call__(
        self, train: Split, val: Split, folder: Path, augmented: Callable[[int], np.ndarray] | None = None
    ) -> Result:
        """`folder` takes files too large to return; `augmented(epoch)` is (n, d) raw features of a fresh
        augmented view of every training image, in the order of `train`, where the caller can make them."""
        ...


def require_labels(protocol: str, **sets: Split) -> None:
    """require_labels("nn", training=train, validation=val) raises UserError unless every image has a label.

    Training images must be of two classes or more. A class of `val` that `train` lacks is the caller's to
    refuse; here its images count as errors.
    """
    for which, split in sets.items():
        if not len(split):
            raise UserError(f"protocol {protocol!r}: there are no {which} images; give a set that has some")
        if missing := int((split.label < 0).sum()):
            raise UserError(
                f"protocol {protocol!r} needs labels, but {missing} of {len(split)} {which} images have none; give a "
                "set with a folder per class, or score without labels: --protocol cluster:clusters=K"
            )
    train = sets.get("training")
    if train and len(found := np.unique(train.label)) < 2:
        raise UserError(
            f"protocol {protocol!r}: every training image is of the one class {train.classes[int(found[0])]!r}, so any "
            "feature would score 100; give a training set of two classes or more"
        )


def percent(hits: np.ndarray) -> float:
    """The share of True, in percent."""
    return 100 * float(np.mean(hits))


def per_class(prediction: np.ndarray, label: np.ndarray, classes: int) -> np.ndarray:
    """(C,) float64: the accuracy within each class in percent, NaN for a class without images."""
    images = np.bincount(label, minlength=classes)
    hits = np.bincount(label[prediction == label], minlength=classes)
    return np.divide(100.0 * hits, images, out=np.full(classes, np.nan), where=images > 0)
