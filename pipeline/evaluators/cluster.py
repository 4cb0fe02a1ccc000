"""Cluster alignment of CompRess: do the clusters of the features agree with the categories?"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from compress_ssl.pipeline.evaluators.base import Result, Split, percent
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.search import exact, kmeans


@dataclass(frozen=True, kw_only=True)
class ClusterAlignment:
    """k-means on training features, clusters mapped to categories, top-1 of validation by that map.

    Koohpayegani et al. 2020, eval_cluster_alignment.py: L2-normalised features, k = classes, 20
    iterations. `top1` maps by shared images / cluster size on the training set and scores validation
    with the training centroids and that map. `hungarian_top1` is the usual clustering accuracy: the
    map by raw counts, fitted and scored on validation. They differ; compare like with like. An empty
    cluster shares nothing with anything (the authors' code divides by zero there).

    With `clusters` other than the classes the map stays one to one: clusters or classes that get no
    partner are all errors. Without labels clusters are found and saved, and the scores are null.
    """

    clusters: int | None = None
    iterations: int = 20
    seed: int = 1234
    name: ClassVar[str] = "cluster"
    needs_labels: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.clusters is not None and self.clusters < 2:
            raise UserError(f"protocol 'cluster': clusters={self.clusters} tells nothing apart; give 2 or more")
        if self.iterations < 1:
            raise UserError(f"protocol 'cluster': iterations={self.iterations} must be 1 or more")

    def __call__(
        self, train: Split, val: Split, folder: Path, augmented: Callable[[int], np.ndarray] | None = None
    ) -> Result:
        """Metrics: `top1`, `hungarian_top1`, `nmi` (arithmetic mean, on validation), `ari` (adjusted Rand,
        validation; 0 is chance and it may fall a little below), `train_top1`, `clusters`, `empty`.

        Arrays: `centroids` (k, d); `train_assignment` (n,), `val_assignment` (n_val,); and with labels
        `mapping` (k,) the class of each cluster or -1, `majority` (k,) its commonest training class or -1,
        `confusion` (C, C + 1): validation images of each class by the class of their cluster, the last
        column those whose cluster has none. Images without a label are clustered, not scored.
        """
        k = self._count(train)
        if not len(val):
            raise UserError("protocol 'cluster': there are no validation images; give a set that has some")
        unit = exact.normalize(train.features)
        centroids, ours = kmeans.kmeans(unit, k, self.iterations, self.seed)
        theirs = kmeans.assign(exact.normalize(val.features), centroids)
        found = {"clusters": k, "empty": int(k - len(np.unique(ours)))}
        arrays = {"centroids": centroids, "train_assignment": ours, "val_assignment": theirs}
        if not ((train.label >= 0).any() and (val.label >= 0).any()):
            scores = dict.fromkeys(("top1", "hungarian_top1", "nmi", "ari", "train_top1"))
            return Result({**scores, **found}, arrays)
        scores, drawn = score(ours, train.label, theirs, val.label, k, len(train.classes))
        return Result({**scores, **found}, {**arrays, **drawn})

    def _count(self, train: Split) -> int:
        k = self.clusters
        if k is None:
            if not (train.label >= 0).any():
                raise UserError(
                    "protocol 'cluster' makes as many clusters as there are classes, but the training images have no "
                    "labels; say how many: --protocol cluster:clusters=K"
                )
            k = len(train.classes)
            if k < 2:
                raise UserError(
                    f"protocol 'cluster': every training image is of the one class {train.classes[0]!r}, and one "
                    "cluster tells nothing; say how many: --protocol cluster:clusters=K"
                )
        if k > len(train):
            raise UserError(
                f"protocol 'cluster': {k} clusters need at least {k} training images, and there are {len(train)}; give "
                "more images, or fewer clusters with cluster:clusters=K"
            )
        return k


def score(
    train_assignment: np.ndarray,
    train_label: np.ndarray,
    val_assignment: np.ndarray,
    val_label: np.ndarray,
    clusters: int,
    classes: int,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Scores and label arrays of ClusterAlignment from assignments (n,) and labels (n,), -1 for none."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    train = contingency(train_assignment, train_label, clusters, classes)
    val = contingency(val_assignment, val_label, clusters, classes)
    size = train.sum(axis=1, keepdims=True)
    mapping = match(np.divide(train, size, out=np.zeros(train.shape), where=size > 0))
    known = val_label >= 0
    predicted, actual, cluster = mapping[val_assignment[known]], val_label[known], val_assignment[known]
    column = np.where(predicted < 0, classes, predicted)
    confusion = np.bincount(actual * (classes + 1) + column, minlength=classes * (classes + 1))
    usual = match(val)
    scores = {
        "top1": percent(predicted == actual),
        "hungarian_top1": percent(usual[cluster] == actual),
        "nmi": 100 * float(normalized_mutual_info_score(actual, cluster)),
        "ari": 100 * float(adjusted_rand_score(actual, cluster)),
        "train_top1": percent((mapping[train_assignment] == train_label)[train_label >= 0]),
    }
    majority = np.where(size[:, 0] > 0, train.argmax(axis=1), -1)
    drawn = {"mapping": mapping, "majority": majority, "confusion": confusion.reshape(classes, classes + 1)}
    return scores, drawn


def contingency(assignment: np.ndarray, label: np.ndarray, clusters: int, classes: int) -> np.ndarray:
    """(clusters, classes) int64: how many images each cluster shares with each class; label -1 is left out."""
    known = label >= 0
    cell = assignment[known] * classes + label[known]
    return np.bincount(cell, minlength=clusters * classes).reshape(clusters, classes)


def match(similarity: np.ndarray) -> np.ndarray:
    """(clusters,) int64: the class of each cluster in the one-to-one map of the largest sum, -1 for none.

    The Hungarian problem, rectangular if need be. A pair that shares nothing may be in the map: it
    completes it, as in the authors' code, and gains nothing.
    """
    from scipy.optimize import linear_sum_assignment

    mapping = np.full(len(similarity), -1, np.int64)
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    mapping[rows] = columns
    return mapping
