"""What an entry means that the record of a run lacks: the defaults of version 1, which did not record them.

Runs record every option since then. A default that is changed in a method's signature is not changed here, so runs
that have begun keep theirs. An option that is new in a method needs a line here if what it does by default changes
the training; else a record without it means the default of its signature.
"""

from collections.abc import Mapping

from compress_ssl.pipeline.runtime.options import Options

METHOD_OPTIONS: Mapping[str, Options] = {
    "compress-2q": {"bank": None, "tau": 0.04, "start": "empty"},
    "compress-2q-momentum": {"bank": None, "tau": 0.04, "start": "empty", "momentum": 0.999},
    "compress-1q": {"bank": None, "tau": 0.04, "start": "store"},
    "seed": {"bank": None, "tau_t": 0.01, "tau_s": 0.2, "start": "store", "target": "auto", "small": None},
    "regression": {"norm": "l2"},
    "crd": {"negatives": 16_384, "tau": 0.07, "momentum": 0.5, "width": 128},
    "simclr-v2": {"head": None, "tau": 1.0},
    "esvit": {"crops": 8, "bank": None, "tau_t": 0.04, "tau_s": 0.1, "momentum": 0.9},
    "dogo": {"tau": 0.1, "tau_ssl": 0.5, "weight": 0.390625, "width": 128},
    "dogo-frozen": {"tau": 0.1, "tau_ssl": 0.5, "weight": 0.390625, "width": 128, "target": "auto"},
}
"""{method: {option: value}}. A method of a user's own has no line: its own signature holds."""

BANKS: Mapping[str, int] = {
    "compress-2q": 128_000, "compress-2q-momentum": 128_000, "compress-1q": 128_000, "seed": 65_536, "esvit": 4096,
}  # fmt: skip
"""{method: slots of its memory bank where `bank` is None}; at most half the usable images."""

EPOCHS: Mapping[str, int] = {
    "compress-2q": 130, "compress-2q-momentum": 130, "compress-1q": 130, "seed": 200, "regression": 130, "crd": 240,
    "simclr-v2": 400, "esvit": 300, "dogo": 1000, "dogo-frozen": 1000,
}  # fmt: skip
"""{method: epochs of its recipe}. Everything else of the recipe is in the records of version 1."""

STUDENT_OPTIONS: Mapping[str, Options] = {
    "cifar-resnet": {"depth": 20, "width": 16, "drop_path": 0.0},
    "convnet": {"channels": (16, 32, 64)},
}
"""{network of our own: {option: value}}, the argument of the spec included."""

CHANNELS_LAST, COMPILE, SYNC_BN = True, False, False
