"""`compress inspect PATH`: what a store, run or evaluation is and how far it got."""

import json
import re
from dataclasses import dataclass
from typing import Any

from pipeline import artifact
from pipeline.config import POSITIVE, flag, require
from pipeline.progress import duration, size
from pipeline.storage import Storage, open_storage


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
    tell = {"store": store, "run": distillation, "evaluation": evaluation}[manifest["kind"]]
    found = tell(storage, manifest)
    figures = savings(storage, config) if manifest["kind"] == "store" else {}
    if figures:
        found |= {"saves": figures.pop("said")}
    lines = [f"{config.path}: a {manifest['kind']}", *(f"  {k}: {v}" for k, v in found.items())]
    return {"summary": "\n".join(lines), "kind": manifest["kind"], **found, **figures, "manifest": manifest}


def store(storage: Storage, manifest: dict[str, Any]) -> dict[str, Any]:
    from pipeline.store import FeatureStore

    here = FeatureStore(storage)
    total, drawn = -(-here.images // here.rows), here.identity["views"]
    held = f"{here.held.start} to {here.views - 1}" if here.held.start else here.views
    history = here.history()
    seconds = sum(event.get("seconds", 0) for event in history)
    views = sum(event.get("views", 0) for event in history)
    seen = sum(event.get("images", 0) for event in history)
    return {
        "fingerprint": here.fingerprint,
        "data": f"{here.images} images of {here.about['data']['spec']}, {len(here.about['classes'])} classes",
        "teacher": f"{here.about['teacher']}, {here.identity['teacher']['width']} dimensions",
        "views": f"{held}, {drawn['policy']}, seed {drawn['seed']}",
        **({"local crops": f"{len(here.local)} of {here.identity['local']['size']} pixels"} if here.local else {}),
        "arrays": ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in here.arrays.items()),
        "codec": here.identity["codec"],
        "shards": f"{total - len(here.pending())} of {total} done, {here.rows} rows each",
        "bad images": len(here.bad_images()),
        "on disk": size(storage.size()),
        "cost": f"{duration(seconds)}, {seen / seconds:.0f} images/s, {views / seconds:.0f} views/s"
        if seconds
        else "not known",
        **({"copied from": here.about["copied"]["from"]} if "copied" in here.about else {}),
    }


def savings(storage: Storage, config: Config) -> dict[str, Any]:
    """What the store cost and saves, as numbers, and in words as `said`.

    The teacher once over N images in V views is N * V forwards; a live one is N forwards for each
    student and epoch. So the store pays from V epochs on, all students' together.
    """
    from pipeline.store import FeatureStore

    here = FeatureStore(storage)
    history, count = here.history(), len(here.all_views)
    cost = {name: sum(event.get(name, 0) for event in history) for name in ("seconds", "images", "views")}
    stored, live = here.images * count, round(here.images * config.students * config.epochs)
    rate = cost["views"] / cost["seconds"] if cost["seconds"] else None
    worth = f", {duration((live - stored) / rate)} of this device" if rate and live > stored else ""
    return {
        "said": f"{live - stored} of {live} teacher forwards for {config.students} students x {config.epochs:g} epochs"
        f"{worth}; pays from {count} epochs on, all students' together",
        "device_seconds": cost["seconds"],
        "images_per_s": cost["images"] / cost["seconds"] if cost["seconds"] else None,
        "views_per_s": rate,
        "stored_forwards": stored,
        "live_forwards": live,
        "break_even_epochs": count,
        "bytes": storage.size(),
        "pending": len(here.pending()),
    }


def distillation(storage: Storage, manifest: dict[str, Any]) -> dict[str, Any]:
    from pipeline import journal

    rows = journal.parse(storage.get("metrics.jsonl").decode()) if storage.exists("metrics.jsonl") else []
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
        "best val nearest neighbour": max(scores, default=None),
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
