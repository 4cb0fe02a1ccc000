"""Distillation methods: losses between a student's outputs and the teacher's stored features.

A method is one file of this package and one line of METHODS. Code outside the package imports `base`,
`memory_bank`, `similarity` and `options` only, and builds methods through METHODS.
"""

from typing import TYPE_CHECKING

from compress_ssl.pipeline.runtime.registry import Registry

if TYPE_CHECKING:
    from compress_ssl.pipeline.methods.base import Method

METHODS: "Registry[Method]" = Registry(
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
        "python": "compress_ssl.pipeline.methods.python:method",
    },
    packages="compress_ssl.methods",
)
