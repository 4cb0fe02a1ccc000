"""`compress inspect PATH`: what anything that compress made is, and how far it got."""

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress_ssl.pipeline.runtime import artifact, jsonl
from compress_ssl.pipeline.runtime.config import POSITIVE, flag, require
from compress_ssl.pipeline.runtime.formatting import format_bytes, format_duration
from compress_ssl.pipeline.runtime.storage import Storage, open_storage

if TYPE_CHECKING:
    from compress_ssl.pipeline.store.feature_store import FeatureStore


@dataclass(frozen=True)
class Config:
    """What a store, run or evaluation is and how far it got."""

    path: str = flag(help="what compress made: a folder, or a URL", place=True)
    students: int = flag(1, "of a store: the students, in all, that are to learn from it ...")
    epochs: float = flag(200.0, "... and the epochs of each, to say what the store saves")


def run(config: Config) -> dict[str, Any]:
    """Returns {"summary", "kind", ...}: the manifest and the progress."""
    storage = open_storage(config.path)
    manifest = artifact.read(storage)
    require(config, {"students": POSITIVE, "epochs": POSITIVE})
    figures: dict[str, Any] = {}
    if manifest["kind"] == "store":
        from compress_ssl.pipeline.store.feature_store import FeatureStore

        here = FeatureStore(storage)
        figures = savings(here, config)
        found = store(here, figures)
    else:
        tell = {"run": distillation, "evaluation": evaluation}.get(manifest["kind"], settings)
        found = tell(storage, manifest)
    lines = [f"{config.path}: {manifest['kind']}", *(f"  {k}: {v}" for k, v in found.items())]
    return {"summary": "\n".join(lines), "kind": manifest["kind"], **found, **figures, "manifest": manifest}


def store(here: "FeatureStore", figures: dict[str, Any]) -> dict[str, Any]:
    """A store in words. figures: its `savings`."""
    about, total, drawn = here.about, -(-here.images // here.rows), here.identity["views"]
    exported = "data" in about  # an evaluation's features name neither their images nor their model
    of = f" of {about['data']['spec']}, {len(about['classes'])} classes" if exported else ", scored by an evaluation"
    held = f"{here.stored_views.start} to {here.views - 1}" if here.stored_views.start else here.views
    cost = f"{format_duration(figures['device_seconds'])}, {figures['images_per_s'] or 0:.0f} images/s"
    return {
        "fingerprint": here.fingerprint,
        "data": f"{here.images} images{of}",
        "teacher": f"{about['teacher'] if exported else 'what was scored'}, {here.arrays['embedding'][0]} dimensions",
        "views": f"{held}, {drawn['policy']}, seed {drawn['seed']}",
        **({"local crops": f"{len(here.local)} of {here.identity['local']['size']} pixels"} if here.local else {}),
        "arrays": ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in here.arrays.items()),
        "codec": here.identity["codec"],
        "shards": f"{total - figures['pending']} of {total} done, {here.rows} rows each",
        "bad images": len(here.bad_images()),
        "on disk": format_bytes(figures["bytes"]),
        "cost": f"{cost}, {figures['views_per_s']:.0f} views/s" if figures["device_seconds"] else "not known",
        **({"copied from": about["copied"]["from"]} if "copied" in about else {}),
        **({"saves": saved(figures)} if exported else {}),
    }


def savings(here: "FeatureStore", config: Config) -> dict[str, Any]:
    """What the store cost and saves, as numbers.

    The teacher once over N images in V views is N * V forwards; a live one is N forwards for each
    student and epoch. So the store pays from V epochs on, all students' together.
    """
    history, count = here.history(), len(here.all_views)
    seconds, images, views = (sum(e.get(name, 0) for e in history) for name in ("seconds", "images", "views"))
    return {
        "students": config.students,
        "epochs": config.epochs,
        "device_seconds": seconds,
        "images_per_s": images / seconds if seconds else None,
        "views_per_s": views / seconds if seconds else None,
        "stored_forwards": here.images * count,
        "live_forwards": round(here.images * config.students * config.epochs),
        "break_even_epochs": count,
        "bytes": here.storage.size(),
        "pending": len(here.pending()),
    }


def saved(figures: dict[str, Any]) -> str:
    """`savings` in words."""
    live, rate = figures["live_forwards"], figures["views_per_s"]
    spared = live - figures["stored_forwards"]
    worth = f", {format_duration(spared / rate)} of this device" if rate and spared > 0 else ""
    return (
        f"{spared} of {live} teacher forwards for {figures['students']} students x {figures['epochs']:g} epochs{worth}"
        f"; pays from {figures['break_even_epochs']} epochs on, all students' together"
    )


def distillation(storage: Storage, manifest: dict[str, Any]) -> dict[str, Any]:

    rows = jsonl.parse_jsonl(storage.get("metrics.jsonl").decode()) if storage.exists("metrics.jsonl") else []
    last: dict[str, Any] = next((row for row in reversed(rows) if "loss" in row), {})
    scores = [row["val_nn"] for row in rows if "val_nn" in row]
    steps = sorted(int(m[1]) for key in storage.list("checkpoints") if (m := re.search(r"step-(\d+)\.pt$", key)))
    identity = manifest["identity"]
    return {
        "student": identity["student"]["spec"],
        "method": identity["method"],
        "store": f"{manifest['about']['store']} ({identity['store']})",
        "pairing": f"{identity['pairing']}, views {identity['views']}",
        "last logged step": last.get("step", 0),
        "epoch": last.get("epoch", 0),
        "loss": last.get("loss"),
        **({"best val nearest neighbour": max(scores)} if scores else {}),
        "checkpoints": ", ".join(map(str, steps)) or "none",
        "finished": storage.exists("student.safetensors"),
    }


def evaluation(storage: Storage, manifest: dict[str, Any]) -> dict[str, Any]:
    scores = artifact.read_json(storage, "metrics.json") if storage.exists("metrics.json") else {}
    return {
        "model": f"{manifest['about']['model']['name']} ({manifest['about']['model']['role']})",
        "train": manifest["about"]["train"],
        "val": manifest["about"]["val"],
        **{name: json.dumps(found) for name, found in scores.items() if name not in ("model", "data")},
        "report": f"{storage}/report.html" if storage.exists("report.html") else "not yet",
    }


def settings(storage: Storage, manifest: dict[str, Any]) -> dict[str, Any]:
    """Anything else of ours: what it was made with."""
    identity = manifest["identity"].items()
    made = {name: value if isinstance(value, str) else json.dumps(value) for name, value in identity}
    return {**made, "on disk": format_bytes(storage.size())}
