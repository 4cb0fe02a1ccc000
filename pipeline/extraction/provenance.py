"""What a store tells about its making, outside every digest: who made it, and which images could not be used."""

import os
import platform
import time
from importlib.metadata import version
from typing import Any

from compress_ssl.pipeline.extraction.embed import Cost
from compress_ssl.pipeline.store.feature_store import FeatureStore

PACKAGES = ("torch", "torchvision", "pillow", "zarr", "numpy")  # whose versions may change a feature's last bits


def history_event(cost: Cost, device: str) -> dict[str, Any]:
    """A line of history.jsonl: who, when, with what, at what cost."""
    return {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "pid": os.getpid(),
        "device": device,
        "versions": {"python": platform.python_version(), **{n: version(n) for n in PACKAGES}},
        "images": cost.images,
        "views": cost.views,
        "seconds": round(cost.seconds, 3),
        "waited": round(cost.waited, 3),
    }


def write_bad_images(store: FeatureStore) -> list[tuple[int, str, str]]:
    """Write bad-images.tsv if there are any: [(row, name, reason), ...], each one a cell of a table."""
    bad = [(i, escape_cell(name), escape_cell(why)) for i, name, why in store.bad_images()]
    if bad:
        lines = ["row\tid\treason", *(f"{i}\t{name}\t{why}" for i, name, why in bad)]
        store.storage.put("bad-images.tsv", ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace"))
    return bad


def escape_cell(text: str) -> str:
    """Text that cannot break a table of tabs and lines: a file's name may hold either."""
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
