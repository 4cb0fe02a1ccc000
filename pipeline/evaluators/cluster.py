"""The cluster-alignment protocol of CompRess: do k-means clusters of the features agree with the categories?

Shapes: k clusters, C classes, n training and n_val validation images, d dims.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from compress_ssl.pipeline.evaluators.base import AugmentedFeatures, Evaluator, Result, Split, percent
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.search import exact, kmeans


@dataclass(frozen=True, kw_only=True)
class ClusterAlignment(Evaluator):
    """Top-1 of validation images by the class that their k-means cluster is mapped to.

    k-means runs on the L2-normalised training features with k = C clusters. Two scores use two different maps, so
    compare like with like:

    `top1` (CompRess): clusters are mapped one to one to classes so that the sum of
    (images shared by cluster and class) / (images of the cluster) on the training set is largest; validation images
    are assigned to the training centroids and scored with that map.

    `hungarian_top1` is the clustering accuracy of most papers: the map is fitted on the raw counts of the validation
    set and scored on the same set. Both maps are found by the Hungarian method (Kuhn 1955, "The Hungarian method for
    the assignment problem").

    Source: CompRess (Koohpayegani et al. 2020, arXiv 2010.14713, "cluster alignment"; eval_cluster_alignment.py of
    the authors). Difference: here an empty cluster shares nothing with any class, where the authors' code divides
    by zero. With k other than C the maps stay one to one, and clusters or classes without a partner count as errors.
    Without labels the clusters are computed and saved, and the scores are null.

    Options: `clusters` (default: the number of classes), `iterations` of k-means, `seed` of its first centroids.
    """

    clusters: int | None = None
    iterations: int = 20
    seed: int = 1234
    name: ClassVar[str] = "cluster"
    needs_labels: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.clusters is not None and self.clusters < 2:
            raise UserError(
                f"protocol 'cluster': clusters={self.clusters} cannot separate images; give clusters=2 or more"
            )
        if self.iterations < 1:
            raise UserError(f"protocol 'cluster': iterations={self.iterations} must be 1 or more")

    def __call__(self, train: Split, val: Split, folder: Path, augmented: AugmentedFeatures | None = None) -> Result:
        """Metrics, the first five in percent: `top1`, `hungarian_top1`, `nmi` and `ari` on validation, `train_top1`.

        nmi is the mutual information of clusters and classes over the arithmetic mean of their entropies. ari is the
        adjusted Rand index; 0 is chance and it may be slightly negative. Further metrics: `clusters`, k, and
        `empty`, how many of them have no training image.

        Arrays: `centroids` (k, d); `train_assignment` (n,), `val_assignment` (n_val,); and with labels `mapping`
        (k,), the class of each cluster or -1; `majority` (k,), its most frequent training class or -1; `confusion`
        (C, C + 1), validation images of each class by the class of their cluster, in the last column those whose
        cluster has none. Images without a label are clustered but not scored.
        """
        k = self._cluster_count(train)
        if not len(val):
            raise UserError("protocol 'cluster': there are no validation images; give a set that has some")
        unit = exact.normalize(train.features)
        centroids, train_assignment = kmeans.kmeans(unit, k, self.iterations, self.seed)
        val_assignment = kmeans.assign(exact.normalize(val.features), centroids)
        counts = {"clusters": k, "empty": int(k - len(np.unique(train_assignment)))}
        arrays = {"centroids": centroids, "train_assignment": train_assignment, "val_assignment": val_assignment}
        if not ((train.label >= 0).any() and (val.label >= 0).any()):
            no_scores = dict.fromkeys(("top1", "hungarian_top1", "nmi", "ari", "train_top1"))
            return Result({**no_scores, **counts}, arrays)
        scores, label_arrays = score_assignments(
            train_assignment, train.label, val_assignment, val.label, k, len(train.classes)
        )
        return Result({**scores, **counts}, {**arrays, **label_arrays})

    def _cluster_count(self, train: Split) -> int:
        """k: the option, or the number of classes. Raises UserError if that is not known or too large."""
        k = self.clusters
        if k is None:
            if not (train.label >= 0).any():
                raise UserError(
                    "protocol 'cluster' makes as many clusters as there are classes, but the training images have no "
                    "labels; give the number of clusters: --protocol cluster:clusters=K"
                )
            k = len(train.classes)
            if k < 2:
                raise UserError(
                    f"protocol 'cluster': every training image is of the one class {train.classes[0]!r}, and a single "
                    "cluster has no score; give the number of clusters: --protocol cluster:clusters=K"
                )
        if k > len(train):
            raise UserError(
                f"protocol 'cluster': {k} clusters need at least {k} training images, and there are {len(train)}; give "
                "more images, or fewer clusters with cluster:clusters=K"
            )
        return k


def score_assignments(
    train_assignment: np.ndarray,
    train_label: np.ndarray,
    val_assignment: np.ndarray,
    val_label: np.ndarray,
    clusters: int,
    classes: int,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(scores, label arrays) of ClusterAlignment, from cluster numbers (n,) and labels (n,), -1 for no label."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    train = count_shared_images(train_assignment, train_label, clusters, classes)
    val = count_shared_images(val_assignment, val_label, clusters, classes)
    size = train.sum(axis=1, keepdims=True)
    mapping = match_clusters(np.divide(train, size, out=np.zeros(train.shape), where=size > 0))
    hungarian_mapping = match_clusters(val)

    labelled = val_label >= 0
    cluster, actual = val_assignment[labelled], val_label[labelled]
    predicted = mapping[cluster]
    column = np.where(predicted < 0, classes, predicted)
    confusion = np.bincount(actual * (classes + 1) + column, minlength=classes * (classes + 1))
    scores = {
        "top1": percent(predicted == actual),
        "hungarian_top1": percent(hungarian_mapping[cluster] == actual),
        "nmi": 100 * float(normalized_mutual_info_score(actual, cluster)),
        "ari": 100 * float(adjusted_rand_score(actual, cluster)),
        "train_top1": percent((mapping[train_assignment] == train_label)[train_label >= 0]),
    }
    majority = np.where(size[:, 0] > 0, train.argmax(axis=1), -1)
    return scores, {
        "mapping": mapping,
        "majority": majority,
        "confusion": confusion.reshape(classes, classes + 1),
    }


def count_shared_images(assignment: np.ndarray, label: np.ndarray, clusters: int, classes: int) -> np.ndarray:
    """(clusters, classes) int64: how many images each cluster shares with each class; label -1 is left out."""
    labelled = label >= 0
    cell = assignment[labelled] * classes + label[labelled]
    return np.bincount(cell, minlength=clusters * classes).reshape(clusters, classes)


def match_clusters(similarity: np.ndarray) -> np.ndarray:
    """(clusters,) int64: the class of each cluster in the one-to-one map of the largest sum, -1 for no class.

    similarity: (clusters, classes), not necessarily square. The map has min(clusters, classes) pairs, so it may
    contain a pair of similarity 0, as in the authors' code.
    """
    from scipy.optimize import linear_sum_assignment

    mapping = np.full(len(similarity), -1, np.int64)
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    mapping[rows] = columns
    return mapping
