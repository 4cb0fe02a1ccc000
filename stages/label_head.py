"""`compress label-head`: fits a linear head on stored embeddings to a few labels, for the method simclr-v2."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.config import NOT_NEGATIVE, POSITIVE, CommandResult, flag, require
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.formatting import shorten
from compress_ssl.pipeline.runtime.storage import open_storage

if TYPE_CHECKING:
    import numpy as np

    from compress_ssl.pipeline.models.linear_head import LinearHead
    from compress_ssl.pipeline.store.feature_store import FeatureStore


@dataclass(frozen=True)
class Config:
    """Fit a linear head to a few labels, from the stored embeddings alone: no image is opened.

    The head makes a self-supervised teacher predict classes; distill reads it with --method simclr-v2:head=FILE.
    """

    store: str = flag(help="The teacher's feature store, with labels.", metavar="STORE")
    out: Path = flag(help="The file to write, for instance head.safetensors.", metavar="FILE")
    labels: str = flag("10%", "The labels to use: a share of each class, such as 1%, or a file of image ids.")
    strength: float = flag(
        1.0, "The inverse of the L2 penalty (C of scikit-learn): a smaller value fits a smoother head."
    )
    seed: int = flag(0, "Seed that selects the images of a share.")
    overwrite: bool = flag(False, "Replace the file if it exists.")


@dataclass(frozen=True)
class Job:
    """A head to fit: the store and the images whose labels are used."""

    store: "FeatureStore"
    classes: tuple[str, ...]
    label: "np.ndarray"  # (N,), -1: no label or a bad image
    rows: "np.ndarray"  # (n,) ascending rows of the labels to use


def run(config: Config) -> CommandResult:
    """Fit and write the head. Returns {"summary", "head", "labelled", "classes", "top1"}.

    "top1" is the accuracy in percent on the labels that were not used, None if there are none. Raises UserError if
    the flags, the labels or the store do not allow a fit.
    """
    job = resolve(config)

    import numpy as np

    from compress_ssl.pipeline.models import linear_head

    store, label, rows = job.store, job.label, job.rows
    features = store.read("embedding", 0)
    head = linear_head.fit(features[rows], label[rows], job.classes, config.strength)
    origin = {"store": store.fingerprint, "labels": config.labels, "labelled": str(len(rows))}
    linear_head.save(head, config.out, {"weights": store.identity.teacher.weights, **origin})
    others = np.setdiff1d(np.flatnonzero(label >= 0), rows)
    top1 = score_head(head, features[others], label[others]) if len(others) else None
    score = "" if top1 is None else f"; top-1 {top1:.2f} % on the {len(others)} labels it has not seen"
    return {
        "summary": f"{config.out}: {len(job.classes)} classes from {len(rows)} labels, view 0 of each{score}",
        "head": str(config.out),
        "labelled": len(rows),
        "classes": len(job.classes),
        "top1": top1,
    }


def resolve(config: Config) -> Job:
    """Check the flags and the store, and select the labels. Raises UserError if none can be used."""
    require(config, {"strength": POSITIVE, "seed": NOT_NEGATIVE})
    share = parse_share(config.labels)
    storage = open_storage(config.store)
    artifact.read(storage, "store")
    if config.out.exists() and not config.overwrite:
        raise UserError(f"{config.out} is there already; name another --out, or replace it with --overwrite")

    import numpy as np

    from compress_ssl.pipeline.datasets.decode import GOOD
    from compress_ssl.pipeline.models import linear_head
    from compress_ssl.pipeline.store.feature_store import FeatureStore
    from compress_ssl.pipeline.store.listed_images import listed_rows

    store = FeatureStore(storage)
    classes = store.class_names()
    if len(set(classes)) < len(classes):
        name = next(name for name in classes if classes.count(name) > 1)
        raise UserError(
            f"{config.store} has two classes of the name {shorten(name, 80)}, and a head tells classes apart by their "
            "names; rename one of their folders and export anew"
        )
    store.require_complete([0])
    label = np.where(store.table("status") == GOOD, store.table("label"), -1)
    if share is None:
        rows = listed_rows(store, config.labels, f"--labels {config.labels} is neither a share, as 10%,")
    else:
        rows = linear_head.choose_labelled(label, share, config.seed)
    rows = rows[label[rows] >= 0]
    if not len(rows):
        raise UserError(
            f"none of the images selected from {config.store} by --labels {config.labels} has a label; select "
            "others, or export images that lie in one folder per class"
        )
    return Job(store, classes, label, rows)


def score_head(head: "LinearHead", features: "np.ndarray", label: "np.ndarray") -> float:
    """Top-1 in percent of a head on embeddings (n, D) with labels (n,)."""
    import torch

    with torch.no_grad():
        prediction = head(torch.from_numpy(features)).argmax(1).numpy()
    return float((prediction == label).mean()) * 100


def parse_share(text: str) -> float | None:
    """`1%` -> 0.01; None for the path of a file. Raises UserError for a share that is none."""
    if text.endswith("%"):
        try:
            share = float(text[:-1]) / 100
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            raise UserError(
                f"--labels is {text}, but a share must be more than 0% and at most 100%; give for instance 10%"
            )
        return share
    return None
