"""How a store was made, in files outside every digest: history.jsonl and bad-images.tsv."""

import os
import platform
import time
from importlib.metadata import version

from compress_ssl.pipeline.extraction.embed import Cost
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.progress import echo
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.records import HistoryEvent

PACKAGES = ("torch", "torchvision", "pillow", "zarr", "numpy")
"""Packages whose versions are recorded, because they may change the last bits of a feature or how it is stored."""


def history_event(cost: Cost, device: str) -> HistoryEvent:
    """A line of history.jsonl: which process on which host computed how much, when, with which versions."""
    return HistoryEvent(
        when=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        host=platform.node(),
        pid=os.getpid(),
        device=device,
        versions={"python": platform.python_version(), **{n: version(n) for n in PACKAGES}},
        images=cost.images,
        views=cost.views,
        seconds=round(cost.seconds, 3),
        waited=round(cost.waited, 3),
    )


def write_bad_images(store: FeatureStore) -> list[tuple[int, str, str]]:
    """Write bad-images.tsv if there are bad images. Returns [(row, id, reason), ...], escaped as in the file."""
    bad = [(i, escape_cell(name), escape_cell(why)) for i, name, why in store.bad_images()]
    if bad:
        lines = ["row\tid\treason", *(f"{i}\t{name}\t{why}" for i, name, why in bad)]
        store.storage.put("bad-images.tsv", ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace"))
    return bad


def report_bad_images(store: FeatureStore) -> int:
    """Write bad-images.tsv, print how many images could not be used with the first reasons, and return the number.

    Raises UserError if no image could be used.
    """
    bad = write_bad_images(store)
    if bad:
        first = "; ".join(f"{name}: {why}" for _, name, why in bad[:3])
        echo(f"{len(bad)} of {store.images} images could not be used (bad-images.tsv): {first}")
    if len(bad) == store.images:
        raise UserError(
            f"none of the {store.images} images could be used; the first is {bad[0][1]}: {bad[0][2]}. "
            "Remove the cause, then export again with --overwrite"
        )
    return len(bad)


def escape_cell(text: str) -> str:
    """Escape tabs, line ends and backslashes, which the name of a file may contain, for a cell of a .tsv file."""
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
