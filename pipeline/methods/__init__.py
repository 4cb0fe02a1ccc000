"""How a student learns from stored features. A method is one file here and one line below."""

from pipeline.menu import Menu

METHODS = Menu(
    "method",
    {
        "compress-2q": "pipeline.methods.compress:TwoQueues",
        "compress-2q-momentum": "pipeline.methods.compress:TwoQueuesMomentum",
        "compress-1q": "pipeline.methods.compress:OneQueue",
        "seed": "pipeline.methods.seed:Seed",
        "regression": "pipeline.methods.regression:Regression",
        "crd": "pipeline.methods.crd:Crd",
        "simclr-v2": "pipeline.methods.simclr_v2:SimClrV2",
        "esvit": "pipeline.methods.esvit:EsVit",
        "dogo": "pipeline.methods.dogo:Dogo",
        "dogo-frozen": "pipeline.methods.dogo:DogoFrozen",
        "python": "pipeline.methods.python:Own",
    },
)
