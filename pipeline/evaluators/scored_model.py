"""What an evaluation scores: a run's student, a store's teacher or any model by its spec; and on which images."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from compress_ssl.pipeline import datasets
from compress_ssl.pipeline.datasets.base import Dataset
from compress_ssl.pipeline.evaluators.record import ModelRecord
from compress_ssl.pipeline.extraction.teacher import load_live_teacher
from compress_ssl.pipeline.models import build
from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.storage import Folder, is_url, open_storage
from compress_ssl.pipeline.store import local_cache, source_images
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.records import DataSource
from compress_ssl.pipeline.training.run_record import RunRecord, read_run
from compress_ssl.pipeline.training.student_choice import choose_student
from compress_ssl.pipeline.views.augment import ViewSpec
from compress_ssl.pipeline.views.preprocessing import Preprocessing

RANDOM_WEIGHTS_SEED = 0  # of a model scored untrained: `compress distill --seed 0` starts from the same weights
MAX_REASON = 200  # characters of a library's error text that are repeated in ours


@dataclass
class ScoredModel:
    """A model with what an evaluation records of it and how its images are rendered."""

    model: ModelRecord
    weights: str  # digest of the weights
    preprocessing: Preprocessing
    views: ViewSpec
    build_embedder: Callable[[], Embedder]  # returns the same network at every call
    data: DataSource | None = None  # the images it was trained or exported on
    store: FeatureStore | None = None  # of a teacher: its stored features
    run: Path | None = None
    sample_ids: Callable[[], Iterable[object]] | None = None  # of the images in `data`, if they are a selection
    teacher_evaluation: Path | None = None  # of a student: the folder where its teacher's evaluation is by default

    def find_store(self, dataset: Dataset) -> FeatureStore | None:
        """The store that holds this model's features of exactly these images; None if there is none."""
        store = self.store
        return store if store and store.identity.data.fingerprint == dataset.fingerprint else None


# ---------------------------------------------------------------- a run's student


def open_run(folder: Path, image_size: int | None) -> ScoredModel:
    """The student of a run: the network named in the run's manifest with the weights in student.safetensors.

    image_size: side in pixels, None for the side it was trained with. Raises UserError if the run is not finished.
    """
    record = read_run(Folder(folder))
    about, student = record.about, record.identity.student
    file = folder / "student.safetensors"
    if not file.exists():
        raise UserError(f"{folder} is not finished: it holds no student.safetensors; repeat its distill command")
    embedder = _build_student(record, folder, image_size)
    load_student(embedder, file)
    return ScoredModel(
        model=ModelRecord(
            about.name,
            "student",
            about.parameters,
            student.width,
            spec=student.spec,
            run=str(folder),
            method=record.identity.method,
        ),
        weights=embedder.digest(),
        preprocessing=embedder.preprocessing,
        views=about.views_spec,
        build_embedder=lambda: embedder,
        data=about.data,
        sample_ids=lambda: FeatureStore(open_storage(about.store)).table("sample_id"),
        run=folder,
        teacher_evaluation=artifact.sibling(about.store, "-evaluation"),
    )


def _build_student(record: RunRecord, folder: Path, image_size: int | None) -> Embedder:
    """The network of a run. If a user's file was moved, the path that was typed may still lead to it."""

    def build_spec(spec: str) -> Embedder:
        choice = choose_student(spec, folder, record, image_size)
        return build(choice.spec, image_size=choice.image_size, recorded=choice.preprocessing)

    try:
        return build_spec(record.student_spec)
    except UserError as problem:
        if record.student_spec == record.identity.student.spec:
            raise
        with suppress(UserError):
            return build_spec(record.identity.student.spec)
        raise problem


def load_student(embedder: Embedder, file: Path) -> None:
    """Load a student.safetensors into the embedder's backbone. Raises UserError if the file is damaged."""
    try:
        with safetensors.safe_open(file, "pt") as opened:
            claimed = opened.metadata()["digest"]
        embedder.backbone.load_state_dict(safetensors.torch.load_file(file))
        reason = "" if embedder.digest() == claimed else "the weights do not fit their digest"
    except (safetensors.SafetensorError, RuntimeError, KeyError, TypeError) as wrong:
        reason = " ".join(str(wrong).split())[:MAX_REASON] or type(wrong).__name__
    if reason:
        raise UserError(f"{file} is damaged ({reason}); delete it and repeat the distill command to write it again")


# ---------------------------------------------------------------- a store's teacher


def open_store(location: str, cache: Path | None, augment: bool) -> FeatureStore:
    """The store at a path or URL; of a URL, a local copy of view 0 or, with `augment`, of all stored views.

    cache: the folder of the copy; None for the usual one.
    """
    store = FeatureStore(open_storage(location))
    used = store.stored_views if augment else [v for v in store.stored_views if v == 0]
    return local_cache.fetch(store, used, cache) if is_url(location) else store


def open_teacher(store: FeatureStore) -> ScoredModel:
    """The teacher of a store. Its features are read from view 0 of the store where that view is stored.

    The network itself is built only when features of other images are needed. Raises UserError for a store without
    a teacher (features of an evaluation) and for one whose view 0 is not complete.
    """
    exported, where = store.export, str(store.storage)
    has_view_0 = 0 in store.stored_views
    if has_view_0:
        store.require_complete([0])
    return ScoredModel(
        model=ModelRecord(
            exported.name, "teacher", exported.parameters, exported.width, spec=exported.teacher, store=where
        ),
        weights=store.identity.teacher.weights,
        preprocessing=store.identity.teacher.preprocessing,
        views=store.identity.views,
        build_embedder=cache(partial(load_live_teacher, store)),
        data=exported.data,
        store=store if has_view_0 else None,
        sample_ids=lambda: store.table("sample_id"),
    )


# ---------------------------------------------------------------- any model


def open_model(spec: str, image_size: int | None, recorded: Preprocessing | None = None) -> ScoredModel:
    """Any model by its spec, for instance `timm:resnet18`. recorded: how an evaluation that has begun prepares images.

    A model without pretrained weights gets those that a run with --seed 0 starts from.
    """
    torch.manual_seed(RANDOM_WEIGHTS_SEED)
    embedder = build(spec, image_size=image_size, recorded=recorded)
    parameters = sum(p.numel() for p in embedder.backbone.parameters())
    return ScoredModel(
        model=ModelRecord(embedder.name, "model", parameters, embedder.width, spec=spec),
        weights=embedder.digest(),
        preprocessing=embedder.preprocessing,
        views=ViewSpec("crop-flip", 0, embedder.preprocessing.crop_ratio),
        build_embedder=lambda: embedder,
    )


# ---------------------------------------------------------------- images


def open_splits(scored: ScoredModel, train: str | None, limit: int | None, val: str) -> tuple[Dataset, Dataset]:
    """(training images, validation images) of two specs.

    train: None for the images that the scored model was trained or exported on; limit: use only this many of `train`.
    Raises UserError if the images of a run or store have moved or changed, or if `val` has a class that labelled
    training images lack: no protocol could predict it.
    """
    if train:
        known = datasets.open_images(train, limit)
    else:
        assert scored.data
        of = str(scored.run or scored.model.store)
        known = source_images.open_recorded(scored.data, scored.sample_ids or tuple, given=None, flag="--train", of=of)
    scored_images = datasets.open_images(val)
    unknown = [name for name in scored_images.classes if name not in known.classes]
    if unknown and (known.label >= 0).any():
        raise UserError(
            f"{len(unknown)} of {len(scored_images.classes)} classes of --val {val} are not among the training images, "
            f"the first is {unknown[0]!r}; give training images of all classes with --train, or remove these classes "
            "from --val"
        )
    return known, scored_images
