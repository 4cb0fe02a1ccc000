"""`compress inspect PATH`: what a store, run or evaluation is and how far it got."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import artifact
from pipeline.config import flag
from pipeline.progress import duration, size
from pipeline.storage import Folder


@dataclass(frozen=True)
class Config:
    """What a store, run or evaluation is and how far it got."""

    path: Path = flag(help="a folder that compress made", place=True)


def run(config: Config) -> dict[str, Any]:
    """Returns {"summary", "kind", ...}: the manifest and the progress."""
    storage = Folder(config.path)
    manifest = artifact.read(storage)
    tell = {"store": store, "run": distillation, "evaluation": evaluation}[manifest["kind"]]
    found = tell(storage, manifest)
    lines = [f"{config.path}: a {manifest['kind']}", *(f"  {k}: {v}" for k, v in found.items())]
    return {"summary": "\n".join(lines), "kind": manifest["kind"], **found, "manifest": manifest}


def store(storage: Folder, manifest: dict[str, Any]) -> dict[str, Any]:
    from pipeline import journal
    from pipeline.store import FeatureStore

    here = FeatureStore(storage)
    total = -(-here.images // here.rows)
    history = journal.read(storage.path / "history.jsonl")
    seconds = sum(event.get("seconds", 0) for event in history)
    views = sum(event.get("views", 0) for event in history)
    return {
        "fingerprint": here.fingerprint,
        "data": f"{here.images} images of {here.about['data']['spec']}, {len(here.about['classes'])} classes",
        "teacher": f"{here.about['teacher']}, {here.identity['teacher']['width']} dimensions",
        "views": f"{here.views}, {here.identity['views']['policy']}, seed {here.identity['views']['seed']}",
        "codec": here.identity["codec"],
        "shards": f"{total - len(here.pending())} of {total} done, {here.rows} rows each",
        "bad images": len(here.bad_images()),
        "on disk": size(sum((storage.path / key).stat().st_size for key in storage.list())),
        "cost": f"{duration(seconds)}, {views / seconds:.0f} views/s" if seconds else "not known",
    }


def distillation(storage: Folder, manifest: dict[str, Any]) -> dict[str, Any]:
    from pipeline import journal

    rows = journal.read(storage.path / "metrics.jsonl")
    last: dict[str, Any] = next((row for row in reversed(rows) if "loss" in row), {})
    scores = [row["val_nn"] for row in rows if "val_nn" in row]
    saved = sorted(p.stem.removeprefix("step-").lstrip("0") for p in storage.path.glob("checkpoints/step-*.pt"))
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
        "checkpoints": ", ".join(saved) or "none",
        "finished": storage.exists("student.safetensors"),
    }


def evaluation(storage: Folder, manifest: dict[str, Any]) -> dict[str, Any]:
    scores = artifact.read_json(storage, "metrics.json") if storage.exists("metrics.json") else {}
    return {
        "model": f"{manifest['about']['model']['name']} ({manifest['about']['model']['role']})",
        "train": manifest["about"]["train"],
        "val": manifest["about"]["val"],
        **{name: json.dumps(found) for name, found in scores.items() if name not in ("model", "data")},
        "report": str(storage.path / "report.html") if storage.exists("report.html") else "not yet",
    }
