"""The protocols that score frozen features, each by its name: `PROTOCOLS.build("knn:k=20")` is an `Evaluator`."""

from typing import TYPE_CHECKING

from compress_ssl.pipeline.runtime.registry import PYTHON, Registry

if TYPE_CHECKING:
    from compress_ssl.pipeline.evaluators.base import Evaluator

PROTOCOLS: "Registry[Evaluator]" = Registry(
    "protocol",
    {
        "nn": "compress_ssl.pipeline.evaluators.nn:NearestNeighbor",
        "knn": "compress_ssl.pipeline.evaluators.knn:WeightedNeighbors",
        "cluster": "compress_ssl.pipeline.evaluators.cluster:ClusterAlignment",
        "linear": "compress_ssl.pipeline.evaluators.linear:LinearProbe",
        "classifier": "compress_ssl.pipeline.evaluators.classifier:Classifier",
        "python": "compress_ssl.pipeline.evaluators.python:protocol",
    },
    packages="compress_ssl.protocols",
)


def find_protocol(name: str) -> "type[Evaluator] | None":
    """The class of a protocol of this package; None if there is none of that name."""
    if name == PYTHON or name not in PROTOCOLS.entries:
        return None
    found: type[Evaluator] = PROTOCOLS.resolve(name)  # type: ignore[assignment]  # these entries are such classes
    return found
