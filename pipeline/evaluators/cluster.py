"""The cluster-alignment protocol of CompRess: do k-means clusters of the features agree with the categories?

Shapes: k clusters, C classes, n training and n_val validation images, d dims.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np

from compress_ssl.pipeline.evaluators.base import (
    FIGURE_SEED,
    AugmentedFeatures,
    ConfusionMatrix,
    Evaluator,
    Figure,
    ImageGrid,
    ImageRow,
    Percent,
    Result,
    Score,
    Split,
    Tile,
    percent,
)
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.records import Count, JsonObject, Meta, read_record, to_json
from compress_ssl.pipeline.search import exact, kmeans

CLUSTERS_SHOWN, IMAGES_SHOWN = 10, 12  # in the report's figure, as wide as the page is
LOWEST_ARI = -50  # percent: scikit-learn's adjusted Rand index is never lower


@dataclass(frozen=True)
class Metrics:
    """The entry `cluster` of metrics.json; without labels there is no score."""

    top1: Percent | None = None
    hungarian_top1: Percent | None = None
    nmi: Percent | None = None
    ari: Annotated[float, Meta(ge=LOWEST_ARI - 0.0001, le=100.0001)] | None = None
    train_top1: Percent | None = None
    clusters: Count = 0
    empty: Count = 0


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
        if not 1 <= self.iterations < 2**31:
            raise UserError(f"protocol 'cluster': iterations={self.iterations} must be from 1 to 2**31 - 1")
        if not -(2**31) <= self.seed < 2**31:
            raise UserError(f"protocol 'cluster': seed={self.seed} must be a number of 32 bits")

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
        arrays = {"centroids": centroids, "train_assignment": train_assignment, "val_assignment": val_assignment}
        scored: dict[str, float] = {}
        if (train.label >= 0).any() and (val.label >= 0).any():
            scored, label_arrays = score_assignments(
                train_assignment, train.label, val_assignment, val.label, k, len(train.classes)
            )
            arrays |= label_arrays
        empty = int(k - len(np.unique(train_assignment)))
        metrics: JsonObject = to_json(Metrics(**scored, clusters=k, empty=empty))
        scores = self.scores_of(self.name, metrics, self.name)
        return Result(metrics, arrays, scores, self.figures_of(metrics, arrays, train, val))

    @classmethod
    def scores_of(cls, entry: str, metrics: JsonObject, where: str) -> list[Score]:
        """Four scores, of which comparisons plot the paper's; none without labels."""
        found = read_record(Metrics, metrics, where, ignore_unknown=True)
        paper = (
            "CompRess: k-means on training; clusters mapped one to one to categories by shared images / cluster size "
            "on training; top-1 on validation by that map"
        )
        usual = "usual clustering accuracy: one-to-one map by raw counts, fitted and scored on validation"
        nmi = "normalised mutual information of clusters and categories on validation, times 100"
        ari = "adjusted Rand index on validation, times 100; 0 is chance"
        scores = []
        if found.top1 is not None:
            scores.append(Score("top1", "Cluster", found.top1, paper, plotted=True))
        if found.hungarian_top1 is not None:
            scores.append(Score("hungarian_top1", "Hungarian", found.hungarian_top1, usual))
        if found.nmi is not None:
            scores.append(Score("nmi", "NMI", found.nmi, nmi))
        if found.ari is not None:
            scores.append(Score("ari", "ARI", found.ari, ari, range=(LOWEST_ARI, 100)))
        return scores

    @classmethod
    def figures_of(cls, metrics: JsonObject, arrays: dict[str, np.ndarray], train: Split, val: Split) -> list[Figure]:
        """Random images of random clusters, as in the CompRess paper; with labels the confusion matrix."""
        figures: list[Figure] = [_show_clusters(arrays, train)]
        if "confusion" in arrays:
            figures.append(_show_confusion(arrays["confusion"], val.classes))
        return figures

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
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
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


# ---------------------------------------------------------------- figures


def _show_clusters(arrays: dict[str, np.ndarray], train: Split) -> ImageGrid:
    """A row for each of up to 10 random clusters, with up to 12 of its training images."""
    assignment, random = arrays["train_assignment"], np.random.default_rng(FIGURE_SEED)
    filled = np.unique(assignment)
    chosen = np.sort(random.choice(filled, min(CLUSTERS_SHOWN, len(filled)), replace=False))
    rows = []
    for cluster in chosen.tolist():
        members = np.flatnonzero(assignment == cluster)
        some = random.choice(members, min(IMAGES_SHOWN, len(members)), replace=False).tolist()
        tiles = tuple(Tile(split="train", index=n, caption=train.category(n)) for n in some)
        lines = tuple(_describe_cluster(cluster, members, arrays, train))
        rows.append(ImageRow(title=f"cluster {cluster}", lines=lines, tiles=tiles))
    note = (
        f"A row is a cluster of the training images. Neither clusters nor images are picked: {len(chosen)} of "
        f"{len(filled)} clusters, up to {IMAGES_SHOWN} images of each, drawn with a fixed seed."
    )
    return ImageGrid(name="clusters", title="Random images of random clusters", note=note, rows=tuple(rows))


def _describe_cluster(cluster: int, members: np.ndarray, arrays: dict[str, np.ndarray], train: Split) -> list[str]:
    """Lines of text: a cluster's size and, with labels, its most frequent category and the one it is mapped to."""
    lines = [f"{len(members)} training images"]
    if "majority" in arrays:
        majority = int(arrays["majority"][cluster])
        if majority >= 0:
            labels = train.label[members]
            share = 100 * np.mean(labels[labels >= 0] == majority)
            lines.append(f"{share:.0f} % {train.classes[majority]}")
        mapped = int(arrays["mapping"][cluster])
        lines.append(f"mapped to {train.classes[mapped]}" if mapped >= 0 else "mapped to no category")
    return lines


def _show_confusion(counts: np.ndarray, classes: tuple[str, ...]) -> ConfusionMatrix:
    """The confusion matrix from (C, C + 1) counts; the last column is drawn only if it has images."""
    unmapped = int(counts[:, -1].sum())
    note = (
        "Validation images by their category (rows) and the category their cluster is mapped to on training (columns)."
    )
    if unmapped:
        note += f" {unmapped} lie in clusters that have no category."
    return ConfusionMatrix(
        name="confusion",
        title="Clusters against categories",
        note=note,
        counts=counts if unmapped else counts[:, :-1],
        rows=classes,
        columns=(*classes, "(none)") if unmapped else classes,
        column_title="category of its cluster",
    )
