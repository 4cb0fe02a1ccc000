"""Reads a metrics.json: whose scores it holds, the scores by short title, and what each title means."""

from collections.abc import Mapping
from typing import Any

from compress_ssl.pipeline.runtime.formatting import is_finite

Metrics = Mapping[str, Any]  # the contents of a metrics.json

MEANINGS = {
    "NN": "top-1 by the nearest training image, L2-normalised features",
    "kNN": "top-1 by a vote of the k nearest, weight exp(cosine / temperature), 0.07 unless given",
    "Cluster": "CompRess: k-means on training; clusters mapped one to one to categories by shared images / cluster "
    "size on training; top-1 on validation by that map",
    "Hungarian": "usual clustering accuracy: one-to-one map by raw counts, fitted and scored on validation",
    "NMI": "normalised mutual information of clusters and categories on validation, times 100",
    "ARI": "adjusted Rand index on validation, times 100; 0 is chance",
    "Linear": "top-1 of a linear layer on frozen features after its last epoch",
    "Classifier": "top-1 of a classifier that was there already: the student's own, or a head for the teacher",
    "top-5": "the same layer: the category is among the five likeliest",
    "best": "its best epoch on validation: selected on the very set it is scored on",
}
"""What a title means, by its last word if that is "top-5" or "best" and by its first word otherwise."""


def model_record(metrics: Metrics) -> Mapping[str, Any]:
    """The record of the scored model (name, role, parameters, ...); empty if there is none."""
    return metrics.get("model") or {}


def is_teacher(metrics: Metrics) -> bool:
    """True if these are the scores of a store's teacher."""
    return model_record(metrics).get("role") == "teacher"


def headline_scores(metrics: Metrics) -> dict[str, float]:
    """The scores by short title ("NN", "kNN 20", ...), in percent and in the order of the page.

    A score that is missing, null or not finite is left out.
    """
    nn, cluster = (metrics.get(key) or {} for key in ("nn", "cluster"))
    found = {"NN": nn.get("top1")}
    for key, value in sorted((metrics.get("knn") or {}).items(), key=_knn_order):
        found[f"kNN {key}".replace(",temperature=", " T=")] = value.get("top1")
    found |= {
        "Cluster": cluster.get("top1"),
        "Hungarian": cluster.get("hungarian_top1"),
        "NMI": cluster.get("nmi"),
        "ARI": cluster.get("ari"),
    }
    for title, probe in linear_probes(metrics).items():
        last, best = probe.get("last") or {}, probe.get("best") or {}
        found |= {title: last.get("top1"), f"{title} top-5": last.get("top5"), f"{title} best": best.get("top1")}
    classifier = metrics.get("classifier") or {}
    found |= {"Classifier": classifier.get("top1"), "Classifier top-5": classifier.get("top5")}
    return {title: float(value) for title, value in found.items() if is_finite(value)}


def _knn_order(item: tuple[str, Any]) -> tuple[int, str]:
    """Sorts keys such as "5", "20" and "20,temperature=0.5" by k: a shorter number is a smaller one."""
    key = item[0]
    return len(key.partition(",")[0]), key


def linear_probes(metrics: Metrics) -> dict[str, Mapping[str, Any]]:
    """The records of the linear probes by title.

    A probe on centre crops and one on augmented images are not comparable, so their titles differ.
    """
    found = {}
    for key in ("linear", "linear_augmented"):
        record = metrics.get(key)
        if record:
            augmented = key == "linear_augmented" or is_augmented(record)
            found["Linear (augmented)" if augmented else "Linear"] = record
    return found


def is_augmented(probe: Mapping[str, Any]) -> bool:
    """True if a probe's record names augmented images. Older metrics.json files store such a probe under `linear`."""
    return "augmented" in str(probe.get("protocol", ""))


def explain_title(title: str, metrics: Metrics) -> str:
    """What a title of `headline_scores` means.

    For a linear layer it includes how that was trained, for a classifier the file of its head.
    """
    first, last = title.split()[0], title.split()[-1]
    text = MEANINGS[last if last in ("top-5", "best") else first]
    if title == "Classifier":
        return f"{text} ({metrics['classifier'].get('head', '')})"
    probe = linear_probes(metrics).get(title)
    return f"{text} ({probe.get('protocol', '')})" if probe else text
