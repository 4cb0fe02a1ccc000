"""The weighted k-nearest-neighbour protocol of DINO, EsViT and solo-learn."""

from dataclasses import dataclass
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
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.records import JsonObject, read_record
from compress_ssl.pipeline.search import exact

VOTE_ROWS = 1024  # validation images per block of votes: (1024, C) float64 is 8 MB for 1000 classes


@dataclass(frozen=True)
class Metrics:
    """One value of the entry `knn` of metrics.json, whose keys say k and the temperature."""

    top1: Percent | None


@dataclass(frozen=True, kw_only=True)
class WeightedNeighbors(Evaluator):
    """Top-1 of a vote of the k nearest training images, each with weight exp(cosine / temperature).

    Score of class c for an image q: the sum over the k nearest x with label c of exp(cos(q, x) / temperature). The
    class of the largest sum is predicted; of two classes with the same sum the first in the class list wins.

    Source: Wu et al. 2018 (arXiv 1805.01978, section 3.4), where k = 200; the defaults k = 20 and temperature 0.07
    are those of DINO (Caron et al. 2021, arXiv 2104.14294).

    Options: `k` in images; `temperature` in units of the cosine, above 0.
    """

    k: int = 20
    temperature: float = 0.07
    name: ClassVar[str] = "knn"
    side_by_side: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"protocol 'knn': k={self.k} is not a number of neighbours; give k=1 or more")
        if not self.temperature > 0:
            raise UserError(f"protocol 'knn': temperature={self.temperature} must be above 0, for instance 0.07")

    def __call__(self, train: Split, val: Split, folder: Path, augmented: AugmentedFeatures | None = None) -> Result:
        """Metrics {"20": {"top1"}}: the key is k, followed by the temperature if it is not 0.07.

        Arrays: `prediction` (n_val,); `per_class` (C,) in percent. Raises UserError for fewer than k training images.
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
        metrics: JsonObject = {key: {"top1": percent(prediction == val.label)}}
        return Result(metrics, arrays, self.scores_of(self.name, metrics, self.name))

    @classmethod
    def scores_of(cls, entry: str, metrics: JsonObject, where: str) -> list[Score]:
        """A score for each k and temperature."""
        note = "top-1 by a vote of the k nearest, weight exp(cosine / temperature), 0.07 unless given"
        return [
            Score(key, f"kNN {key}".replace(",temperature=", " T="), one.top1, note, term="kNN")
            for key, one in read_record(dict[str, Metrics], metrics, where, ignore_unknown=True).items()
            if one.top1 is not None
        ]

    def _vote(self, cosine: np.ndarray, label: np.ndarray, classes: int) -> np.ndarray:
        """(n,) int64: the winning class of each image, from (n, k) cosines and (n, k) labels of its neighbours."""
        winner = np.empty(len(label), np.int64)
        for start in range(0, len(label), VOTE_ROWS):
            block = slice(start, start + VOTE_ROWS)
            near, voted = cosine[block].astype(np.float64), label[block]
            weight = np.exp((near - near[:, :1]) / self.temperature)  # relative to the nearest, so exp cannot overflow
            cell = np.arange(len(voted))[:, None] * classes + voted  # index into the flattened (rows, C) votes
            votes = np.bincount(cell.ravel(), weight.ravel(), minlength=len(voted) * classes)
            winner[block] = votes.reshape(len(voted), classes).argmax(axis=1)
        return winner
