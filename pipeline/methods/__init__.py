"""How a student learns from stored features. A method is one file here and one line below."""

from pipeline.menu import Menu

METHODS = Menu(
    "method",
    {
        "compress-2q": "pipeline.methods.compress:TwoQueues",
        "compress-2q-momentum": "pipeline.methods.compress:TwoQueuesMomentum",
        "compress-1q": "pipeline.methods.compress:OneQueue",
        "seed": "pipeline.methods.seed:Seed",
        "python": "pipeline.methods.python:Own",
    },
)
