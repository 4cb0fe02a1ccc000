"""The classifier protocol: a linear head from a file is scored as it is, without any training.

Shapes: n_val validation images, d dims, C classes of the images, H classes of the head.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from compress_ssl.pipeline.evaluators.base import (
    AugmentedFeatures,
    Evaluator,
    Percent,
    Result,
    Score,
    Split,
    per_class,
    percent,
    require_labels,
)
from compress_ssl.pipeline.models import linear_head
from compress_ssl.pipeline.models.linear_head import LinearHead
from compress_ssl.pipeline.runtime import digests
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.progress import echo
from compress_ssl.pipeline.runtime.records import UNSET, Count, JsonObject, UnsetType, read_record, to_json

BLOCK = 4096  # images at a time: (4096, H) logits are 16 MB for 1000 classes


@dataclass(frozen=True)
class Metrics:
    """The entry `classifier` of metrics.json."""

    top1: Percent | None
    top5: Percent | UnsetType | None = UNSET  # of a head with more than five classes
    mean_per_class: Percent | UnsetType | None = UNSET
    unknown: Count = 0  # validation images whose class the head lacks
    head: str = ""  # its file


@dataclass(frozen=True, kw_only=True)
class Classifier(Evaluator):
    """Top-1 and top-5 of a linear head in a file: a student's (RUN/head.safetensors) or one of compress label-head.

    Score: the share of validation images whose class is the first, or among the first five, by the head's logits.
    SimCLR v2 (Chen et al. 2020, arXiv 2006.10029) scores its distilled students by their own classifier in this way.
    The head's classes are matched with the images' classes by name; a head without names must be in the order of the
    images' classes. Of equal logits the lower class number of the head comes first. Training labels are not used.

    Options: `head`, the file. An evaluation keeps the result of one head, the last that was scored.
    """

    head: Path = field(compare=False)  # not compared: another file of the same content is the same protocol
    digest: str = field(init=False)
    linear: LinearHead = field(init=False, compare=False, repr=False)
    name: ClassVar[str] = "classifier"
    needs_labels: ClassVar[tuple[str, ...]] = ("validation",)

    def __post_init__(self) -> None:
        linear = linear_head.load(self.head)
        object.__setattr__(self, "linear", linear)
        object.__setattr__(self, "digest", digests.digest(linear_head.to_bytes(linear)))

    @property
    def model_digest(self) -> str:
        """Digest of the weights whose embeddings the head is for; "" if the file does not name it."""
        return self.linear.of

    def __call__(self, train: Split, val: Split, folder: Path, augmented: AugmentedFeatures | None = None) -> Result:
        """Metrics: `top1`, `top5` (if the head has more than five classes) and `mean_per_class` in percent.

        `unknown` is the number of validation images whose class the head lacks, which count as errors; `head` is the
        file. Arrays: `prediction` (n_val,), -1 for a class that the images do not have; `per_class` (C,) in percent.
        Raises UserError if the head does not fit the features' width or the images' classes.
        """
        require_labels(self.name, validation=val)
        if self.linear.width != val.features.shape[1]:
            raise UserError(
                f"protocol 'classifier': {self.head} is for embeddings of {self.linear.width} dimensions, and this "
                f"model's have {val.features.shape[1]}; give the head of this model: its run's head.safetensors, "
                "or one made from its store with compress label-head"
            )
        head_class = self._head_classes(val)
        first, rank = self._rank(val.features, head_class[val.label])
        known = head_class >= 0
        image_class = np.full(self.linear.classes, -1, np.int64)  # (H,): the inverse of head_class
        image_class[head_class[known]] = np.flatnonzero(known)
        prediction = image_class[first]
        accuracy = per_class(prediction, val.label, len(val.classes))
        found = Metrics(
            top1=percent(rank < 1),
            top5=percent(rank < 5) if self.linear.classes > 5 else UNSET,
            mean_per_class=float(np.nanmean(accuracy)),
            unknown=int((head_class[val.label] < 0).sum()),
            head=str(self.head),
        )
        metrics: JsonObject = to_json(found)
        arrays = {"prediction": prediction, "per_class": accuracy}
        return Result(metrics, arrays, self.scores_of(self.name, metrics, self.name))

    @classmethod
    def scores_of(cls, entry: str, metrics: JsonObject, where: str) -> list[Score]:
        """Top-1, which comparisons plot, and top-5."""
        found = read_record(Metrics, metrics, where, ignore_unknown=True)
        top1 = "top-1 of a classifier that was there already: the student's own, or a head for the teacher"
        top5 = "the same layer: the category is among the five likeliest"
        scores = []
        if found.top1 is not None:
            scores.append(Score("top1", "Classifier", found.top1, top1, detail=found.head, plotted=True))
        if isinstance(found.top5, float):
            scores.append(Score("top5", "Classifier top-5", found.top5, top5, term="top-5"))
        return scores

    def _head_classes(self, val: Split) -> np.ndarray:
        """(C,) int64: the head's number for each class of the images, -1 for a class that the head lacks.

        Raises UserError if the head has none of the validation images' classes; some that it lacks are reported.
        """
        names, classes = self.linear.names, val.classes
        if names is None:
            if self.linear.classes != len(classes):
                raise UserError(
                    f"protocol 'classifier': {self.head} has {self.linear.classes} classes without names, and the "
                    f"images have {len(classes)}; give images of the head's classes with --train and --val"
                )
            return np.arange(len(classes))
        number = {name: y for y, name in enumerate(names)}
        head_class = np.array([number.get(name, -1) for name in classes], np.int64)
        present = np.unique(val.label)
        missing = present[head_class[present] < 0]
        if len(missing) == len(present):
            raise UserError(
                f"protocol 'classifier': {self.head} has none of the {len(present)} classes of the validation images: "
                f"its first is {names[0]!r}, theirs {classes[int(missing[0])]!r}; give a head for these classes, or "
                "--val images of its own"
            )
        if len(missing):
            images = int(np.isin(val.label, missing).sum())
            echo(
                f"{images} of {len(val)} validation images are of classes that {self.head} does not have, the first is "
                f"{classes[int(missing[0])]!r}; they count as errors"
            )
        return head_class

    def _rank(self, features: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(first, rank), each (n_val,) int64, by the head's logits for features (n_val, d).

        first: the class with the largest logit. rank: how many classes come before the target class; H, all of
        them, for a target of -1.
        """
        import torch

        first, rank = np.empty((2, len(features)), np.int64)
        column = np.arange(self.linear.classes)
        for start in range(0, len(features), BLOCK):
            part = slice(start, start + BLOCK)
            with torch.no_grad():
                logits = self.linear(torch.tensor(features[part])).numpy()  # (BLOCK, H)
            wanted = target[part, None]
            own = np.take_along_axis(logits, np.maximum(wanted, 0), axis=1)
            before = (logits > own) | ((logits == own) & (column < wanted))
            first[part] = logits.argmax(axis=1)
            rank[part] = np.where(wanted[:, 0] < 0, self.linear.classes, before.sum(axis=1))
        return first, rank
