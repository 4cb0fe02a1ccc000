"""How a student learns from stored features. A method is one file here and one line below."""

from compress_ssl.pipeline.runtime.registry import Registry

METHODS = Registry(
    "method",
    {
        "compress-2q": "compress_ssl.pipeline.methods.compress:TwoQueues",
        "compress-2q-momentum": "compress_ssl.pipeline.methods.compress:TwoQueuesMomentum",
        "compress-1q": "compress_ssl.pipeline.methods.compress:OneQueue",
        "seed": "compress_ssl.pipeline.methods.seed:Seed",
        "regression": "compress_ssl.pipeline.methods.regression:Regression",
        "crd": "compress_ssl.pipeline.methods.crd:Crd",
        "simclr-v2": "compress_ssl.pipeline.methods.simclr_v2:SimClrV2",
        "esvit": "compress_ssl.pipeline.methods.esvit:EsVit",
        "dogo": "compress_ssl.pipeline.methods.dogo:Dogo",
        "dogo-frozen": "compress_ssl.pipeline.methods.dogo:DogoFrozen",
        "python": "compress_ssl.pipeline.methods.python:UserMethod",
    },
)
