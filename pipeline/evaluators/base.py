"""What a protocol takes and returns: two splits of features in; numbers, scores and figures out.

Shapes: n images of a split, d dims, C classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np

from compress_ssl.pipeline.datasets.base import Dataset
from compress_ssl.pipeline.evaluators.figures import (
    Bars,
    ConfusionMatrix,
    Figure,
    ImageGrid,
    ImageRow,
    Lines,
    Panel,
    Tile,
)
from compress_ssl.pipeline.evaluators.record import DataRecord, Evaluation, ModelRecord
from compress_ssl.pipeline.evaluators.scores import Score
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.records import JsonObject, Meta

__all__ = [
    "AugmentedFeatures", "Bars", "ConfusionMatrix", "DataRecord", "Evaluation", "Evaluator", "Figure", "ImageGrid",
    "ImageRow", "Lines", "ModelRecord", "Panel", "Percent", "Result", "Score", "Split", "Tile", "per_class", "percent",
    "require_labels",
]  # fmt: skip

AugmentedFeatures = Callable[[int], np.ndarray]
"""epoch -> (n, d) raw features of another random view of every training image, in the order of the training split."""

Percent = Annotated[float, Meta(ge=0, le=100.0001)]
"""A percentage in a metrics.json; rounding may carry 100 a little further."""

FIGURE_SEED = 0  # decides which images the image grids of our protocols show


@dataclass(frozen=True, eq=False)
class Split:
    """Features of the usable images of one data set, in view 0. Both splits of a command share one class list.

    Raises ValueError if the arrays do not describe the same n images.
    """

    features: np.ndarray  # (n, d) float32, raw: every protocol does its own normalisation
    label: np.ndarray  # (n,) int64 into `classes`, -1 for an image without a label
    rows: np.ndarray  # (n,) int64: i, the row in the data set; the report loads the image by it
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or not len(self.features) == len(self.label) == len(self.rows):
            shapes = self.features.shape, self.label.shape, self.rows.shape
            raise ValueError(f"features, label and rows have shapes {shapes}, not (n, d), (n,), (n,)")

    def __len__(self) -> int:
        return len(self.features)

    def category(self, n: int) -> str:
        """The name of the class of image n; "no label" for an image without one."""
        return self.classes[int(self.label[n])] if self.label[n] >= 0 else "no label"


@dataclass(frozen=True, eq=False)
class Result:
    """What one protocol computed. It is kept on disk, so that a finished protocol is not computed again."""

    metrics: JsonObject  # its entry in metrics.json: any numbers and words, with finite numbers
    arrays: dict[str, np.ndarray] = field(default_factory=dict)  # kept beside it as .npz, for whoever reads them
    scores: Sequence[Score] = ()  # what the summary, the report and the comparison show, in this order
    figures: Sequence[Figure] = ()  # what the report draws, in this order


class Evaluator(ABC):
    """A protocol with its options, as a frozen dataclass. The same splits and options give the same Result.

    The fields of the dataclass are the options of the spec (`knn:k=20`), and by them a finished result is found
    again on disk: see `results.Results`. A protocol of a user's own writes `name` and `__call__` (docs/protocols.md).
    """

    name: ClassVar[str]  # the entry in metrics.json; letters, digits and hyphens
    needs_labels: ClassVar[tuple[str, ...]] = ("training", "validation")  # the splits that must have labels
    side_by_side: ClassVar[bool] = False  # True: results of several options share the entry, with keys of their own

    @property
    def model_digest(self) -> str:
        """Digest of the weights of the one model that this evaluator fits; "" if it fits every model."""
        return ""

    @property
    def needs_augmented(self) -> bool:
        """True if the protocol calls `augmented`, so that a store must have other views than view 0 at hand."""
        return False

    @abstractmethod
    def __call__(self, train: Split, val: Split, folder: Path, augmented: AugmentedFeatures | None = None) -> Result:
        """Score features of `val`, with those of `train` as neighbours, clusters or training set.

        `folder` takes files that are too large for a Result. `augmented` is None where the caller has neither images
        nor stored views. The splits must not be changed. Raises UserError if they lack what the protocol needs.
        """

    # ---------------------------------------------------------------- the entry in metrics.json

    @classmethod
    def entry(cls, options: JsonObject) -> str:
        """The entry in metrics.json of a result with these options: `name`, or `name`, "_" and a variant."""
        return cls.name

    @classmethod
    def scores_of(cls, entry: str, metrics: JsonObject, where: str) -> list[Score]:
        """The scores in an entry that version 1 wrote, without a list of its scores. Only its protocols have such.

        where: names the entry in errors. Raises InvalidRecord for what is not an entry of this protocol.
        """
        return []

    @classmethod
    def figures_of(
        cls, metrics: JsonObject, arrays: dict[str, np.ndarray], train: Split, val: Split
    ) -> Sequence[Figure]:
        """The figures of a result, from what version 1 kept of one; see `scores_of`. KeyError if it lacks an array."""
        return []


def require_labels(protocol: str, **sets: Split | Dataset) -> None:
    """require_labels("nn", training=train, validation=val) raises UserError unless every image has a label.

    The sets are splits, or data sets before their features are computed.
    The training images must have at least two classes. Whether `val` has a class that `train` lacks is checked by
    the caller (stages/evaluate.py); here images of such a class count as errors.
    """
    for which, split in sets.items():
        if not len(split):
            raise UserError(f"protocol {protocol!r}: there are no {which} images; give a set that has some")
        missing = int((split.label < 0).sum())
        if missing:
            raise UserError(
                f"protocol {protocol!r} needs labels, but {missing} of {len(split)} {which} images have none; give a "
                "set with a folder per class, or score without labels: --protocol cluster:clusters=K"
            )
    train = sets.get("training")
    if not train:
        return
    present = np.unique(train.label)
    if len(present) < 2:
        raise UserError(
            f"protocol {protocol!r}: every training image is of the one class {train.classes[int(present[0])]!r}, so "
            "any feature would score 100; give a training set of two classes or more"
        )


def percent(hits: np.ndarray) -> float:
    """The share of True in a boolean array, in percent."""
    return 100 * float(np.mean(hits))


def per_class(prediction: np.ndarray, label: np.ndarray, classes: int) -> np.ndarray:
    """(C,) float64: the accuracy within each class in percent, NaN for a class without images.

    prediction and label: (n,) int64, a label in 0..C-1.
    """
    images = np.bincount(label, minlength=classes)
    hits = np.bincount(label[prediction == label], minlength=classes)
    accuracy: np.ndarray = np.divide(100.0 * hits, images, out=np.full(classes, np.nan), where=images > 0)
    return accuracy
