"""The ways to score features: each a protocol of the field, by name."""

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
