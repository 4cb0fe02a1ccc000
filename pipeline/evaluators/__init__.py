"""The ways to score features: each a protocol of the field, by name."""

from pipeline.menu import Menu

PROTOCOLS = Menu(
    "protocol",
    {
        "nn": "pipeline.evaluators.nn:NearestNeighbor",
        "knn": "pipeline.evaluators.knn:WeightedNeighbors",
        "cluster": "pipeline.evaluators.cluster:ClusterAlignment",
        "linear": "pipeline.evaluators.linear:LinearProbe",
        "classifier": "pipeline.evaluators.classifier:Classifier",
    },
)
