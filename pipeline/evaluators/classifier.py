"""A classifier that is there already, scored as it is: nothing is trained and no training label is looked at."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from compress_ssl.pipeline.evaluators.base import Result, Split, per_class, percent, require_labels
from compress_ssl.pipeline.models import linear_head
from compress_ssl.pipeline.models.linear_head import LinearHead
from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.progress import echo

BLOCK = 4096  # images at a time


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """Accuracy of a linear head in a file: a student's own (RUN/head.safetensors), or one of compress label-head.

    Its classes are matched with the images' by name; a head without names is taken to be in the order of the
    images' classes. Of two classes with the same logit the first of the head wins. An evaluation keeps the
    result of one head, the last that was scored.
    """

    head: Path = field(compare=False)  # another file of the same content is the same protocol
    digest: str = field(init=False)
    linear: LinearHead = field(init=False, compare=False, repr=False)
    name: ClassVar[str] = "classifier"
    needs_labels: ClassVar[tuple[str, ...]] = ("validation",)

    def __post_init__(self) -> None:
        linear = linear_head.load(self.head)
        object.__setattr__(self, "linear", linear)
        object.__setattr__(self, "digest", artifact.digest(linear_head.to_bytes(linear)))

    @property
    def of(self) -> str:
        """Digest of the weights that it classifies for; "" if the file does not say."""
        return self.linear.of

    def __call__(
        self, train: Split, val: Split, folder: Path, augmented: Callable[[int], np.ndarray] | None = None
    ) -> Result:
        """Metrics: `top1`, `top5` (where the head has more than five classes), `mean_per_class`, `unknown`:
        validation images of classes that the head does not know, which are errors, and `head`, the file.

        Arrays: `prediction` (n_val,), -1 for a class that the images do not have; `per_class` (C,) in percent.
        """
        require_labels(self.name, validation=val)
        if self.linear.width != val.features.shape[1]:
            raise UserError(
                f"protocol 'classifier': {self.head} is for embeddings of {self.linear.width} dimensions, and this "
                f"model's have {val.features.shape[1]}; give the head of this very model: its run's head.safetensors, "
                "or one made from its store with compress label-head"
            )
        number = self._numbers(val)
        first, rank = self._rank(val.features, number[val.label])
        known = number >= 0
        back = np.full(self.linear.classes, -1, np.int64)
        back[number[known]] = np.flatnonzero(known)
        prediction = back[first]
        accuracy = per_class(prediction, val.label, len(val.classes))
        metrics: dict[str, Any] = {"top1": percent(rank < 1)}
        if self.linear.classes > 5:
            metrics["top5"] = percent(rank < 5)
        metrics |= {"mean_per_class": float(np.nanmean(accuracy)), "unknown": int((number[val.label] < 0).sum())}
        return Result({**metrics, "head": str(self.head)}, {"prediction": prediction, "per_class": accuracy})

    def _numbers(self, val: Split) -> np.ndarray:
        """(C,) int64: the head's number of each of the images' classes, -1 for one that it does not know."""
        names, classes = self.linear.names, val.classes
        if names is None:
            if self.linear.classes != len(classes):
                raise UserError(
                    f"protocol 'classifier': {self.head} has {self.linear.classes} classes without names, and the "
                    f"images have {len(classes)}; give images of its very classes with --train and --val"
                )
            return np.arange(len(classes))
        place = {name: y for y, name in enumerate(names)}
        number = np.array([place.get(name, -1) for name in classes], np.int64)
        shown = np.unique(val.label)
        if len(lost := shown[number[shown] < 0]) == len(shown):
            raise UserError(
                f"protocol 'classifier': {self.head} knows none of the {len(shown)} classes of the validation images: "
                f"its first is {names[0]!r}, theirs {classes[int(lost[0])]!r}; give a head for these classes, or --val "
                "images of its own"
            )
        if len(lost):
            images = int(np.isin(val.label, lost).sum())
            echo(
                f"{images} of {len(val)} validation images are of classes that {self.head} does not know, the first is "
                f"{classes[int(lost[0])]!r}; they count as errors"
            )
        return number

    def _rank(self, features: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The head's first class of each row, and how many it puts before the target: all of them if that is -1."""
        import torch

        first, rank = np.empty((2, len(features)), np.int64)
        column = np.arange(self.linear.classes)
        for start in range(0, len(features), BLOCK):
            part = slice(start, start + BLOCK)
            with torch.no_grad():
                logits = self.linear(torch.tensor(features[part])).numpy()  # (BLOCK, C)
            wanted = target[part, None]
            own = np.take_along_axis(logits, np.maximum(wanted, 0), axis=1)
            before = (logits > own) | ((logits == own) & (column < wanted))
            first[part] = logits.argmax(axis=1)
            rank[part] = np.where(wanted[:, 0] < 0, self.linear.classes, before.sum(axis=1))
        return first, rank
