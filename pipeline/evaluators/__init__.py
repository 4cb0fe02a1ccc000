"""The protocols that score frozen features, each by its name: `PROTOCOLS.build("knn:k=20")` is an `Evaluator`."""

from compress_ssl.pipeline.runtime.registry import Registry

PROTOCOLS = Registry(
    "protocol",
    {
        "nn": "compress_ssl.pipeline.evaluators.nn:NearestNeighbor",
        "knn": "compress_ssl.pipeline.evaluators.knn:WeightedNeighbors",
        "cluster": "compress_ssl.pipeline.evaluators.cluster:ClusterAlignment",
        "linear": "compress_ssl.pipeline.evaluators.linear:LinearProbe",
        "classifier": "compress_ssl.pipeline.evaluators.classifier:Classifier",
    },
)
