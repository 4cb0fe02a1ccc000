"""Weighted k nearest neighbours, as DINO, EsViT and solo-learn score."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from compress_ssl.pipeline.evaluators.base import Result, Split, per_class, percent, require_labels
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.search import exact


@dataclass(frozen=True, kw_only=True)
class WeightedNeighbors:
    """Top-1 of a vote of the k nearest training images, each with weight exp(cosine / temperature).

    Wu et al. 2018, sec. 3.4; k = 20 and temperature 0.07 as in Caron et al. 2021 (DINO). Of two
    classes with the same vote the first in the class list wins.
    """

    k: int = 20
    temperature: float = 0.07
    name: ClassVar[str] = "knn"
    needs_labels: ClassVar[tuple[str, ...]] = ("training", "validation")

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"protocol 'knn': k={self.k} neighbours cannot vote; give k=1 or more")
        if not self.temperature > 0:
            raise UserError(f"protocol 'knn': temperature={self.temperature} must be above 0, for instance 0.07")

    def __call__(
        self, train: Split, val: Split, folder: Path, augmented: Callable[[int], np.ndarray] | None = None
    ) -> Result:
        """Metrics {"20": {"top1"}}: the key is k, with the temperature if it is not 0.07.

        Arrays: `prediction` (n_val,); `per_class` (C,) in percent.
        """
        require_labels(self.name, training=train, validation=val)
        if self.k > len(train):
            raise UserError(
                f"protocol 'knn': {self.k} neighbours were asked for, but there are {len(train)} training images; "
                f"pass knn:k={len(train)} or less, or use nn"
            )
        cosine, ids = exact.search(val.features, train.features, self.k, "cosine")
        prediction = self._vote(cosine, train.label[ids], len(train.classes))
        key = str(self.k) if self.temperature == 0.07 else f"{self.k},temperature={self.temperature:g}"
        arrays = {"prediction": prediction, "per_class": per_class(prediction, val.label, len(val.classes))}
        return Result({key: {"top1": percent(prediction == val.label)}}, arrays)

    def _vote(self, cosine: np.ndarray, label: np.ndarray, classes: int) -> np.ndarray:
        """(n, k) similarities and labels -> (n,) winning classes; by blocks, for (n, C) votes are large."""
        winner = np.empty(len(label), np.int64)
        for start in range(0, len(label), 1024):
            near, vote = cosine[start : start + 1024].astype(np.float64), label[start : start + 1024]
            weight = np.exp((near - near[:, :1]) / self.temperature)  # the nearest weighs 1: no overflow
            cell = np.arange(len(vote))[:, None] * classes + vote
            votes = np.bincount(cell.ravel(), weight.ravel(), minlength=len(vote) * classes)
            winner[start : start + 1024] = votes.reshape(len(vote), classes).argmax(axis=1)
        return winner
