"""`compress inspect PATH`: shows what a folder made by compress is and how far it got."""

import json
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from compress_ssl.pipeline.evaluators.record import METRICS, read_evaluation, read_evaluation_record
from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.config import CommandResult, flag, require
from compress_ssl.pipeline.runtime.formatting import format_bytes, format_duration, is_finite
from compress_ssl.pipeline.runtime.options import option_text
from compress_ssl.pipeline.runtime.records import UNSET, to_json
from compress_ssl.pipeline.runtime.storage import Storage, open_storage
from compress_ssl.pipeline.training.metrics_log import MetricsRow, read_metrics

if TYPE_CHECKING:
    from compress_ssl.pipeline.store.feature_store import FeatureStore
    from compress_ssl.pipeline.training.run_record import RunRecord

PLAUSIBLE = (lambda x: 0 < x <= 10**9, "must be more than 0 and at most 10**9")  # so that products are finite


@dataclass(frozen=True)
class Config:
    """What a store, run or evaluation is and how far it got."""

    path: str = flag(help="A folder that compress made, or its URL.", metavar="PATH", place=True)
    students: int = flag(1, "Students to train on a store, for the estimate of what it saves.")
    epochs: float = flag(200.0, "Epochs of each of these students, for the same estimate.")


def run(config: Config) -> CommandResult:
    """Returns {"summary", "kind", "manifest"} and what the describe_* function of that kind returns.

    For a store it also returns its `Savings`. Raises UserError for a folder of another origin.
    """
    storage = open_storage(config.path)
    manifest = artifact.read(storage)
    require(config, {"students": PLAUSIBLE, "epochs": PLAUSIBLE})
    numbers: CommandResult = {}
    if manifest.kind == "store":
        from compress_ssl.pipeline.store.feature_store import FeatureStore

        store = FeatureStore(storage)
        savings = compute_savings(store, config)
        described, numbers = describe_store(store, savings), asdict(savings)
    elif manifest.kind == "run":
        described = describe_run(storage, manifest)
    elif manifest.kind == "evaluation":
        described = describe_evaluation(storage, manifest)
    else:
        described = describe_identity(storage, manifest)
    lines = [f"{config.path}: {manifest.kind}", *(f"  {key}: {value}" for key, value in described.items())]
    return {"summary": "\n".join(lines), "kind": manifest.kind, **described, **numbers, "manifest": to_json(manifest)}


# ---------------------------------------------------------------- a store


@dataclass(frozen=True)
class Savings:
    """What a store cost and what it saves, in numbers.

    To embed N images in V views the teacher needs N * V forward passes, once. Without a store it needs N passes for
    each student and epoch. So the store pays from V epochs on, summed over all students.
    """

    students: int
    epochs: float  # of each student
    device_seconds: float  # of the export
    images_per_s: float | None  # None: the time is not known
    views_per_s: float | None
    stored_forwards: int
    live_forwards: int
    break_even_epochs: int
    bytes: int
    pending: int  # shards


def describe_store(store: "FeatureStore", savings: Savings) -> CommandResult:
    """A store in words, by title."""
    about, identity = store.about, store.identity
    exported = bool(about.data)  # false for an evaluation's features, which name neither their images nor their model
    if exported:
        origin, teacher = f" of {store.export.data.spec}, {len(store.export.classes)} classes", store.export.teacher
    else:
        origin, teacher = ", scored by an evaluation", "what was scored"
    first = store.stored_views.start  # above 0 if view 0 is not stored
    views = f"{first} to {store.views - 1}" if first else str(store.views)
    described: CommandResult = {
        "fingerprint": store.fingerprint,
        "data": f"{store.images} images{origin}",
        "teacher": f"{teacher}, {store.arrays['embedding'][0]} dimensions",
        "views": f"{views}, {identity.views.policy}, seed {identity.views.seed}",
    }
    described |= {f"{group.noun}s": f"{group.count} of {group.size} pixels" for group in store.groups[1:]}
    described |= {
        "arrays": ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in store.arrays.items()),
        "codec": identity.codec,
        "shards": f"{store.blocks - savings.pending} of {store.blocks} done, {store.rows} rows each",
        "bad images": len(store.bad_images()),
        "on disk": format_bytes(savings.bytes),
        "cost": format_cost(savings),
    }
    if about.copied_from is not None:
        described["copied from"] = about.copied_from
    if exported:
        described["saves"] = format_savings(savings)
    return described


def compute_savings(store: "FeatureStore", config: Config) -> Savings:
    """The savings of a store for the students and epochs of the Config."""
    history, view_count = store.history(), len(store.all_views)
    seconds = sum(event.seconds for event in history)
    images, views = sum(event.images for event in history), sum(event.views for event in history)
    return Savings(
        students=config.students,
        epochs=config.epochs,
        device_seconds=seconds,
        images_per_s=images / seconds if seconds else None,
        views_per_s=views / seconds if seconds else None,
        stored_forwards=store.images * view_count,
        live_forwards=round(store.images * config.students * config.epochs),
        break_even_epochs=view_count,
        bytes=store.storage.size(),
        pending=len(store.pending()),
    )


def format_cost(savings: Savings) -> str:
    """The device time of the export and its rates, in words."""
    if savings.images_per_s is None or savings.views_per_s is None:
        return "not known"
    time = format_duration(savings.device_seconds)
    return f"{time}, {savings.images_per_s:.0f} images/s, {savings.views_per_s:.0f} views/s"


def format_savings(savings: Savings) -> str:
    """What a store saves, in words."""
    live, rate = savings.live_forwards, savings.views_per_s
    saved = live - savings.stored_forwards
    time = f", {format_duration(saved / rate)} of this device" if rate and saved > 0 else ""
    return (
        f"{saved} of {live} teacher forwards for {savings.students} students x {savings.epochs:g} epochs{time}"
        f"; pays off once the epochs of all students add up to {savings.break_even_epochs}"
    )


# ---------------------------------------------------------------- a run


def describe_run(storage: Storage, manifest: artifact.Manifest) -> CommandResult:
    """A run of distill in words and numbers, by title: its settings, the last logged step and its checkpoints."""
    from compress_ssl.pipeline.training.run_record import parse_run

    record = parse_run(manifest, f"{storage}/{artifact.MANIFEST}")
    identity, about = record.identity, record.about
    rows = read_metrics(storage)
    last = next((row for row in reversed(rows) if row.loss is not None), MetricsRow(0, {"epoch": 0}))
    scores = [row.values["val_nn"] for row in rows if is_finite(row.values.get("val_nn"))]
    checkpoints = list_checkpoints(storage)
    described: CommandResult = {
        "student": identity.student.spec,
        "method": identity.method,
        "store": f"{about.store} ({identity.store})",
        "pairing": f"{identity.pairing}, views {list(identity.views)}",
        "last logged step": last.step,
        "epoch": last.values.get("epoch", 0),
        "loss": last.loss,
    }
    if identity.options:
        described["options"] = ", ".join(f"{name}={option_text(value)}" for name, value in identity.options.items())
    if about.steps is not UNSET:
        described["steps"] = about.steps
    if scores:
        described["best val nearest neighbour"] = max(scores)
    described["checkpoints"] = ", ".join(map(str, checkpoints)) or "none"
    described["finished"] = is_finished(storage, record, max(checkpoints, default=last.step))
    return described


def is_finished(storage: Storage, record: "RunRecord", taken: int) -> bool:
    """Whether a run has been trained to its end and its student is written. taken: steps that it has taken.

    A run of version 1 does not record its length: there, the written student is all there is to go by.
    """
    steps = record.about.steps
    return storage.exists("student.safetensors") and (steps is UNSET or taken >= steps)


def list_checkpoints(storage: Storage) -> list[int]:
    """The steps of a run's checkpoints, ascending."""
    matches = [re.search(r"step-(\d+)\.pt$", key) for key in storage.list("checkpoints")]
    return sorted(int(match[1]) for match in matches if match)


# ---------------------------------------------------------------- an evaluation, and anything else


def describe_evaluation(storage: Storage, manifest: artifact.Manifest) -> CommandResult:
    """An evaluation by title: its model, its images, the scores of each protocol and the path of its page."""
    about = read_evaluation_record(manifest, str(storage)).about
    protocols = read_evaluation(storage).protocols if storage.exists(METRICS) else {}
    return {
        "model": f"{about.model.name} ({about.model.role})",
        "train": about.train,
        "val": about.val,
        **{name: json.dumps(found) for name, found in protocols.items()},
        "report": f"{storage}/report.html" if storage.exists("report.html") else "not yet",
    }


def describe_identity(storage: Storage, manifest: artifact.Manifest) -> CommandResult:
    """Any other kind of folder: the settings it was made with, and its size."""
    settings = {
        name: value if isinstance(value, str) else json.dumps(value) for name, value in manifest.identity.items()
    }
    return {**settings, "on disk": format_bytes(storage.size())}
