"""What an evaluation scores: a run's student, a store's teacher, or any model."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from compress_ssl.pipeline.extraction.teacher import load_live_teacher
from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.storage import Folder, open_storage
from compress_ssl.pipeline.store import source_images
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.views.augment import ViewSpec

Build = Callable[..., Embedder]  # (spec, image_size=, pretrained_default=) -> Embedder


@dataclass
class ScoredModel:
    """How to build it, how it sees, where it belongs."""

    model: dict[str, Any]  # for metrics.json: name, role, parameters, width, spec
    weights: str  # digest
    preprocessing: dict[str, Any]
    spec: ViewSpec
    build: Callable[[], Embedder]  # the same one every time
    home: Path  # where its evaluation goes by default
    data: dict[str, Any] | None = None  # the images it came from: {"spec", "limit"}
    store: FeatureStore | None = None  # stored features, for the teacher
    run: Path | None = None
    ids: Callable[[], Any] | None = None  # sample ids of its images, if they are a selection
    beside: Path | None = None  # where the teacher's evaluation would be

    def stored(self, dataset: Any) -> FeatureStore | None:
        """The store that holds this subject's features of these very images, if there is one."""
        store = self.store
        return store if store and store.identity["data"]["fingerprint"] == dataset.fingerprint else None


def from_run(folder: Path, image_size: int | None, build: Build) -> ScoredModel:
    """A student: its network as the run's manifest names it, its weights from student.safetensors."""
    manifest = artifact.read(Folder(folder), "run")
    about, student = manifest["about"], manifest["identity"]["student"]
    file = folder / "student.safetensors"
    if not file.exists():
        raise UserError(f"{folder} is not finished: it holds no student.safetensors; repeat its distill command")
    size = image_size or student["preprocessing"]["size"]
    embedder = build(student["spec"], image_size=size, pretrained_default=False)
    load_student(embedder, file)
    model = {"name": about["name"], "role": "student", "parameters": about["parameters"], "width": student["width"]}
    return ScoredModel(
        {**model, "spec": student["spec"], "run": str(folder), "method": manifest["identity"]["method"]},
        embedder.digest(),
        embedder.preprocessing.record(),
        ViewSpec(**about["views_spec"]),
        lambda: embedder,
        folder / "evaluation",
        about["data"],
        ids=lambda: FeatureStore(open_storage(about["store"])).table("sample_id"),
        run=folder,
        beside=artifact.sibling(about["store"], "-evaluation"),
    )


def load_student(embedder: Embedder, file: Path) -> None:
    """Put the weights of a student.safetensors into its backbone. Raises UserError if they are damaged."""
    try:
        with safetensors.safe_open(file, "pt") as opened:
            claimed = opened.metadata()["digest"]
        embedder.backbone.load_state_dict(safetensors.torch.load_file(file))
        why = "" if embedder.digest() == claimed else "the weights do not fit their digest"
    except (safetensors.SafetensorError, RuntimeError, KeyError, TypeError) as wrong:
        why = " ".join(str(wrong).split())[:200] or type(wrong).__name__
    if why:
        raise UserError(f"{file} is damaged ({why}); delete it and repeat the distill command, which writes it anew")


def from_store(store: FeatureStore, build: Build) -> ScoredModel:
    """A teacher: its features from the store; the network itself is built only for other images."""
    source_images.require_exported(store)
    if 0 in store.stored_views:
        store.require_complete([0])
    where, teacher, about = str(store.storage), store.identity["teacher"], store.about

    model = {"name": teacher["name"], "role": "teacher", "parameters": about["parameters"], "width": teacher["width"]}
    return ScoredModel(
        {**model, "spec": about["teacher"], "store": where},
        teacher["weights"],
        teacher["preprocessing"],
        ViewSpec(**store.identity["views"]),
        cache(partial(load_live_teacher, store)),
        artifact.sibling(where, "-evaluation"),
        about["data"],
        store=store if 0 in store.stored_views else None,
        ids=lambda: store.table("sample_id"),
    )


def from_model(spec: str, image_size: int | None, home: Path, build: Build) -> ScoredModel:
    """Any model by its spec. Random weights are those a run with --seed 0 begins with."""
    torch.manual_seed(0)
    embedder = build(spec, image_size=image_size, pretrained_default=False)
    parameters = sum(p.numel() for p in embedder.backbone.parameters())
    model = {"name": embedder.name, "role": "model", "parameters": parameters, "width": embedder.width}
    return ScoredModel(
        {**model, "spec": spec},
        embedder.digest(),
        embedder.preprocessing.record(),
        ViewSpec("crop-flip", 0, embedder.preprocessing.crop_ratio),
        lambda: embedder,
        home,
    )
