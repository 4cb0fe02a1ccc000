"""What a metrics.json says: whose it is, its scores by short title, and what each title means."""

from collections.abc import Mapping
from typing import Any

from compress_ssl.pipeline.runtime.formatting import is_finite

Metrics = Mapping[str, Any]  # a metrics.json

NOTES = {
    "NN": "top-1 by the nearest training image, L2-normalised features",
    "kNN": "top-1 by a vote of the k nearest, weight exp(cosine / temperature), 0.07 unless said",
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
"""The first or the last word of a title: what it means."""


def model(metrics: Metrics) -> Mapping[str, Any]:
    return metrics.get("model") or {}


def is_teacher(metrics: Metrics) -> bool:
    return model(metrics).get("role") == "teacher"


def headline_scores(metrics: Metrics) -> dict[str, float]:
    """The scores by short title, in percent and in the order of the page; missing ones are absent."""
    nn, cluster = (metrics.get(key) or {} for key in ("nn", "cluster"))
    knn = sorted((metrics.get("knn") or {}).items(), key=lambda item: (len(item[0].partition(",")[0]), item[0]))
    found = {
        "NN": nn.get("top1"),
        **{f"kNN {key}".replace(",temperature=", " T="): value.get("top1") for key, value in knn},
        "Cluster": cluster.get("top1"),
        "Hungarian": cluster.get("hungarian_top1"),
        "NMI": cluster.get("nmi"),
        "ARI": cluster.get("ari"),
    }
    for title, probe in probes(metrics).items():
        last, best = probe.get("last") or {}, probe.get("best") or {}
        found |= {title: last.get("top1"), f"{title} top-5": last.get("top5"), f"{title} best": best.get("top1")}
    classifier = metrics.get("classifier") or {}
    found |= {"Classifier": classifier.get("top1"), "Classifier top-5": classifier.get("top5")}
    return {title: float(value) for title, value in found.items() if is_finite(value)}


def probes(metrics: Metrics) -> dict[str, Mapping[str, Any]]:
    """The linear probes by title: centre crops and augmented images are not comparable, so they share none."""
    found = {}
    for key in ("linear", "linear_augmented"):
        if record := metrics.get(key):
            augmented = key == "linear_augmented" or is_augmented(record)
            found["Linear (augmented)" if augmented else "Linear"] = record
    return found


def is_augmented(probe: Mapping[str, Any]) -> bool:
    """By its own word: in a metrics.json of before it had a key of its own, it lies under `linear`."""
    return "augmented" in str(probe.get("protocol", ""))


def meaning(title: str, metrics: Metrics) -> str:
    """What a title of `readings` means; for a linear layer how it was trained too, for a classifier its file."""
    first, last = title.split()[0], title.split()[-1]
    text = NOTES[last if last in ("top-5", "best") else first]
    if title == "Classifier":
        return f"{text} ({metrics['classifier'].get('head', '')})"
    probe = probes(metrics).get(title)
    return f"{text} ({probe.get('protocol', '')})" if probe else text
