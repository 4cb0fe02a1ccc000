"""`compress label-head`: a linear head on stored embeddings, fitted to a few labels, for simclr-v2."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.config import POSITIVE, flag, require
from compress_ssl.pipeline.runtime.storage import open_storage

if TYPE_CHECKING:
    import numpy as np

    from compress_ssl.pipeline.store.feature_store import FeatureStore


@dataclass(frozen=True)
class Config:
    """Fit a linear head to a few labels, on the stored embeddings alone: no image is opened.

    What makes a teacher without labels a task's teacher; distill reads it as --method simclr-v2:head=FILE.
    """

    store: str = flag(help="the teacher's feature store, with labels")
    out: Path = flag(help="the file to write, as head.safetensors")
    labels: str = flag("10%", "which labels may be used: a share of each class, as 1%, or a file of image ids")
    strength: float = flag(1.0, "inverse of the L2 penalty: smaller is smoother")
    seed: int = flag(0, "of which images a share takes")
    overwrite: bool = flag(False, "replace the file")


def run(config: Config) -> dict[str, Any]:
    """Fit and write the head. Returns {"summary", "head", "labelled", "classes", "top1": on the other labels}."""
    require(config, {"strength": POSITIVE, "seed": (lambda x: x >= 0, "must be 0 or more")})
    share = share_of(config.labels)
    storage = open_storage(config.store)
    artifact.read(storage, "store")
    if config.out.exists() and not config.overwrite:
        raise UserError(f"{config.out} is there already; name another --out, or replace it with --overwrite")

    import numpy as np
    import torch

    from compress_ssl.pipeline.datasets.decode import GOOD
    from compress_ssl.pipeline.models import linear_head
    from compress_ssl.pipeline.store import source_images
    from compress_ssl.pipeline.store.feature_store import FeatureStore

    store = FeatureStore(storage)
    source_images.require_exported(store)
    store.require_complete([0])
    label = np.where(store.table("status") == GOOD, store.table("label"), -1)
    rows = named(store, config.labels) if share is None else linear_head.choose_labelled(label, share, config.seed)
    rows = rows[label[rows] >= 0]
    if not len(rows):
        raise UserError(f"{config.store} has no labelled image among those asked for; export with class subfolders")
    features = store.read("embedding", 0)
    names = store.about["classes"]
    head = linear_head.fit(features[rows], label[rows], names, config.strength)
    said = {"store": store.fingerprint, "labels": config.labels, "labelled": str(len(rows))}
    linear_head.save(head, config.out, {"weights": store.identity["teacher"]["weights"], **said})
    rest = np.setdiff1d(np.flatnonzero(label >= 0), rows)
    with torch.no_grad():
        top1 = float((head(torch.from_numpy(features[rest])).argmax(1).numpy() == label[rest]).mean()) * 100
    seen = f"; top-1 {top1:.2f} % on the {len(rest)} labels it has not seen" if len(rest) else ""
    return {
        "summary": f"{config.out}: {len(names)} classes from {len(rows)} labels, view 0 of each{seen}",
        "head": str(config.out),
        "labelled": len(rows),
        "classes": len(names),
        "top1": top1 if len(rest) else None,
    }


def share_of(text: str) -> float | None:
    """`1%` -> 0.01; None for what is a file. Raises UserError."""
    if text.endswith("%"):
        try:
            share = float(text[:-1]) / 100
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            raise UserError(f"--labels is {text}, but a share must be more than 0% and at most 100%")
        return share
    if not Path(text).is_file():
        raise UserError(f"--labels {text} is neither a share, as 10%, nor a file of image ids; check the path")
    return None


def named(store: "FeatureStore", file: str) -> "np.ndarray":
    """Rows of the images that a file lists, by id or by file name. Raises UserError for one that is not there."""
    import numpy as np

    ids = [str(name) for name in store.table("sample_id")]
    short = [name.rpartition("/")[2] for name in ids]
    shared = {name for name, count in Counter(short).items() if count > 1}
    row = {name: i for i, name in enumerate(short)} | {name: i for i, name in enumerate(ids)}
    asked = [line.strip() for line in Path(file).read_text().splitlines() if line.strip()]
    if doubtful := [name for name in asked if name in shared and name not in ids]:
        raise UserError(f"{file} names {doubtful[0]}, and several images are called so; give ids, as {ids[0]}")
    if missing := [name for name in asked if name not in row]:
        raise UserError(
            f"{len(missing)} of {len(asked)} ids in {file} are not in {store.storage}, the first is {missing[0]}; "
            f"they look like {ids[0]}"
        )
    return np.array(sorted({row[name] for name in asked}), np.int64)
