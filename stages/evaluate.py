"""Model -> features on disk -> FAISS indices -> protocols -> metrics.json and report.html."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress_ssl.pipeline.runtime import artifact, jsonl
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.config import NOT_NEGATIVE, POSITIVE, flag, one_of, require
from compress_ssl.pipeline.runtime.progress import echo, progress_bar
from compress_ssl.pipeline.runtime.signals import StopRequest
from compress_ssl.pipeline.runtime.storage import Folder, is_url, open_storage

if TYPE_CHECKING:
    import numpy as np

    from compress_ssl.pipeline.datasets.base import Dataset
    from compress_ssl.pipeline.evaluators.base import Split
    from compress_ssl.pipeline.evaluators.results import Result
    from compress_ssl.pipeline.evaluators.scored_model import ScoredModel
    from compress_ssl.pipeline.store.feature_store import FeatureStore

THUMBNAIL = 96  # pixels, of the report's pictures


@dataclass(frozen=True)
class Config:
    """Score a student, the teacher of a store, or any model: neighbours, clusters, linear probes, a classifier.

    Features, index and finished protocols stay on disk; the same command computes what is missing.
    """

    val: str = flag(help="images to score, labelled: folder:PATH, digits:split=test, ...")
    train: str | None = flag(None, "images to learn neighbours and clusters from (default: those of the run or store)")
    limit: int | None = flag(None, "with --train: only this many of them, evenly spread, as the export does")
    run: Path | None = flag(None, "a run of compress distill: its student is scored")
    store: str | None = flag(None, "a feature store: its teacher is scored, from stored view 0 where it has it")
    cache: Path | None = flag(None, "with --store URL: folder for its local copy (default: the XDG cache)")
    model: str | None = flag(None, "any model: timm:NAME, cifar-resnet:20, ...")
    protocol: tuple[str, ...] = flag(("nn", "knn:k=20", "cluster", "linear"), "nn, knn:k=20, cluster, linear, ...")
    out: Path | None = flag(None, "folder (default: RUN/evaluation, STORE-evaluation; here for a URL)")
    teacher: Path | None = flag(None, "evaluation of the teacher, to stand beside in the report")
    image_size: int | None = flag(None, "side in pixels (default: as trained, the model's own)")
    batch_size: int = flag(64, "images per forward on a device", short="-b")
    workers: int | None = flag(None, "loader processes (default: one per core up to 16; 4 on CPU)", short="-j")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1")
    precision: str = flag("fp32", "fp32, bf16, fp16")
    overwrite: bool = flag(False, "start anew; an earlier evaluation is set aside, not deleted")


def run(config: Config) -> dict[str, Any]:
    """Score what is missing. Returns {"summary", "evaluation", "metrics"}."""
    check(config)
    from compress_ssl.pipeline.evaluators import PROTOCOLS

    evaluators = {spec: PROTOCOLS.build(spec) for spec in config.protocol}
    scored = open_scored_model(config, any(e.needs_augmented for e in evaluators.values()))
    out = config.out or scored.default_out
    anew = config.overwrite and artifact.replaceable(out, "evaluation")
    earlier = None if anew else artifact.claimed(Folder(out), "evaluation")
    train_data, val_data = open_sets(config, scored)
    if earlier:
        require_its_images(config, scored, earlier, train_data, val_data)
    suits(evaluators, scored, train_data, val_data)

    from compress_ssl.pipeline.runtime.device import choose_device

    choose_device(config.device)
    identity = {
        "model": {"weights": scored.weights, "preprocessing": scored.preprocessing},
        "crop_ratio": scored.views.crop_ratio,
        "data": {"train": train_data.fingerprint, "val": val_data.fingerprint},
        "precision": config.precision,
    }
    about = {"model": scored.model, "train": train_spec(config, scored), "val": config.val}
    if config.overwrite and (aside := artifact.move_aside(out, "evaluation")):  # only now, when little is refused
        echo(f"set the earlier {out} aside as {aside}")
    artifact.claim(Folder(out), "evaluation", identity, about)
    train, val = splits(config, scored, train_data, val_data, out)
    metrics, results = score(config, scored, evaluators, train, val, train_data, out)
    Folder(out).put("metrics.json", json.dumps(metrics, indent=1).encode() + b"\n")
    page = write_report(config, scored, metrics, results, train, val, train_data, val_data, out)
    return {"summary": f"{headline(metrics)}\n{page}", "evaluation": str(out), "metrics": metrics}


def check(config: Config) -> None:
    """All that can be refused before torch is imported."""
    require(config, {"batch_size": POSITIVE, "image_size": POSITIVE, "limit": POSITIVE, "workers": NOT_NEGATIVE})
    require(config, {"precision": one_of("fp32", "bf16", "fp16")})
    given = [name for name in ("run", "store", "model") if getattr(config, name)]
    if len(given) != 1:
        raise UserError(f"give one of --run, --store and --model; given: {' and '.join(given) or 'none'}")
    if config.model and not (config.out and config.train):
        raise UserError("--model needs --train and --out: a bare model knows neither images nor a folder of its own")
    if config.limit and not config.train:
        raise UserError("--limit goes with --train; the images of a run or store are as many as they were")
    if config.store and config.image_size:
        raise UserError("--image-size does not go with --store: its features are stored already")
    from compress_ssl.pipeline.datasets import DATASETS
    from compress_ssl.pipeline.evaluators import PROTOCOLS
    from compress_ssl.pipeline.models import MODELS

    for images in filter(None, (config.val, config.train)):
        DATASETS.parse(images)
    for protocol in config.protocol:
        PROTOCOLS.parse(protocol)
    if config.model:
        MODELS.parse(config.model)
    if config.run:
        artifact.read(Folder(config.run), "run")
    if config.store:
        artifact.read(open_storage(config.store), "store")


def open_scored_model(config: Config, augment: bool) -> "ScoredModel":
    from compress_ssl.pipeline.evaluators import scored_model

    if config.run:
        return scored_model.open_run(config.run, config.image_size)
    if config.store:
        return scored_model.open_teacher(open_store(config, config.store, augment))
    assert config.model and config.out
    return scored_model.open_model(config.model, config.image_size, config.out)


def open_store(config: Config, where: str, augment: bool) -> "FeatureStore":
    """The store, by way of a local copy if it is remote: of view 0, of all views to augment."""
    from compress_ssl.pipeline.store.feature_store import FeatureStore
    from compress_ssl.pipeline.store.local_cache import fetch

    store = FeatureStore(open_storage(where))
    used = store.stored_views if augment else [v for v in store.stored_views if v == 0]
    return fetch(store, used, config.cache) if is_url(where) else store


def train_spec(config: Config, scored: "ScoredModel") -> str:
    return config.train or str((scored.data or {}).get("spec"))


def open_sets(config: Config, scored: "ScoredModel") -> tuple["Dataset", "Dataset"]:
    """Training and validation images. Raises UserError for a class in val that train lacks."""
    from compress_ssl.pipeline.datasets import DATASETS
    from compress_ssl.pipeline.store import source_images

    if config.train:
        train = DATASETS.build(config.train)
        train = train.subset(config.limit) if config.limit else train
    else:
        assert scored.data
        of = str(config.run or config.store)
        ids = scored.sample_ids or tuple
        train = source_images.open_recorded(scored.data, ids, DATASETS.build, given=None, flag="--train", of=of)
    val = DATASETS.build(config.val)
    unknown = [name for name in val.classes if name not in train.classes]
    if unknown and (train.label >= 0).any():
        raise UserError(
            f"{len(unknown)} of {len(val.classes)} classes of --val {config.val} are not among the training images, "
            f"the first is {unknown[0]!r}; give training images of all classes with --train, or take them out of --val"
        )
    return train, val


def require_its_images(
    config: Config, scored: "ScoredModel", earlier: dict[str, Any], train: "Dataset", val: "Dataset"
) -> None:
    """Raises UserError if the evaluation that is there was made from other images."""
    for which, dataset, asked in (("train", train, train_spec(config, scored)), ("val", val, config.val)):
        if earlier["identity"]["data"][which] != dataset.fingerprint:
            raise artifact.Mismatch(
                f"{config.out or scored.default_out} was made with the {which} images of {earlier['about'][which]} as "
                f"they were then, and those of {asked} are others; choose another --out, or start anew with --overwrite"
            )


def suits(evaluators: dict[str, Any], scored: "ScoredModel", train: Any, val: Any) -> None:
    """Refuse a protocol for another model, or for labels where there are none, before hours of features."""
    from compress_ssl.pipeline.evaluators.base import require_labels

    sets = {"training": train, "validation": val}
    for spec, evaluator in evaluators.items():
        if evaluator.model_digest not in ("", scored.weights):
            raise UserError(
                f"--protocol {spec} was made for another model than {scored.model['name']}; give the head of this "
                "one: its run's head.safetensors, or one made from its store with compress label-head"
            )
        require_labels(spec, **{which: sets[which] for which in evaluator.needs_labels})


def splits(
    config: Config, scored: "ScoredModel", train: "Dataset", val: "Dataset", out: Path
) -> tuple["Split", "Split"]:
    """Features of both sets on disk, resumed where they stopped; labels joined by class name.

    Both have the classes of the training images, or, where these have no labels, of the validation images.
    """
    classes = (*train.classes, *(name for name in val.classes if name not in train.classes))
    first = scored.find_store(train) or embed_set(config, scored, train, out / "features" / "train")
    second = scored.find_store(val) or embed_set(config, scored, val, out / "features" / "val")
    return split(first, train, classes), split(second, val, classes)


def embed_set(config: Config, scored: "ScoredModel", dataset: "Dataset", folder: Path) -> "FeatureStore":
    """View 0 of a data set through the scored, as a store of one exact view."""
    from compress_ssl.pipeline.extraction.embed import FeatureExtractor, embed
    from compress_ssl.pipeline.runtime.device import choose_device, loader_workers
    from compress_ssl.pipeline.store.feature_store import FeatureStore
    from compress_ssl.pipeline.store.shards import shard_rows

    arrays = {"embedding": [scored.model["width"]]}
    identity = {
        "data": {"fingerprint": dataset.fingerprint, "images": len(dataset)},
        "teacher": {"weights": scored.weights, "preprocessing": scored.preprocessing},
        "views": {**scored.views.record(), "policy": "none"},
        "arrays": arrays,
        "codec": "float32",
        "batch_size": config.batch_size,
        "precision": config.precision,
        "shard_rows": shard_rows(len(dataset), config.batch_size, arrays, 4),
    }
    tables = {"sample_id": dataset.ids, "label": dataset.label, "view_key": range(len(dataset))}
    store = FeatureStore.create(Folder(folder), identity, {"views": 1}, tables)
    if pending := store.pending():
        device = choose_device(config.device)
        rows = sum(s.stop - s.start for s in pending)
        with (
            StopRequest() as stop,
            progress_bar(f"features {folder.name}", store.images, "images", store.images - rows) as bar,
        ):
            forward = FeatureExtractor(scored.build_embedder(), device, config.precision, config.batch_size)
            workers = loader_workers(config.workers, device)
            embed(
                store, dataset, scored.views, forward, workers=workers, progress=bar.advance,
                stopped=lambda: stop.requested,
            )  # fmt: skip
            stop.check("features so far are kept; repeat the command to continue")
    return store


def split(store: "FeatureStore", dataset: "Dataset", classes: tuple[str, ...]) -> "Split":
    """The usable rows of view 0, labels as numbers into `classes`. Raises UserError if there are none."""
    import numpy as np

    from compress_ssl.pipeline.datasets.decode import GOOD
    from compress_ssl.pipeline.evaluators.base import Split

    rows = np.flatnonzero(store.table("status") == GOOD)
    if not len(rows):
        _, name, why = store.bad_images()[0]
        raise UserError(
            f"none of the {len(dataset)} images of {store.storage} can be used, the first is {name}: {why}; "
            "mend them, then repeat the command with another --out"
        )
    if len(rows) < len(dataset):
        echo(f"{len(dataset) - len(rows)} of {len(dataset)} images cannot be used and are left out")
    number = {name: y for y, name in enumerate(classes)}
    joined = np.array([number.get(name, -1) for name in dataset.classes] + [-1], np.int64)
    return Split(store.read("embedding", 0)[rows], joined[dataset.label[rows]], rows, classes)


def score(
    config: Config, scored: "ScoredModel", evaluators: dict[str, Any], train: "Split", val: "Split",
    train_data: "Dataset", out: Path,
) -> tuple[dict[str, Any], dict[str, "Result"]]:  # fmt: skip
    """metrics.json as a dictionary, and the results, with every protocol ever scored here."""
    from compress_ssl.pipeline.evaluators.results import Results

    metrics: dict[str, Any] = {
        "model": scored.model,
        "data": {
            "train": train_spec(config, scored), "train_images": len(train),
            "val": config.val, "val_images": len(val), "classes": len(train.classes),
        },
    }  # fmt: skip
    results, augmented = Results(Folder(out)), augmenter(config, scored, train, train_data)
    for spec, evaluator in evaluators.items():
        if results.get(evaluator) is None:
            results.put(evaluator, spec, evaluator(train, val, out, augmented))
    scores, found = results.gather(evaluators.values())
    return metrics | scores, found


def augmenter(
    config: Config, scored: "ScoredModel", train: "Split", dataset: "Dataset"
) -> "Callable[[int], np.ndarray] | None":
    """epoch -> (n, d) features of another random view of every training image.

    From the store, its random views in turn; else crops and flips seen afresh.
    """
    if stored := scored.find_store(dataset):
        drawn = [view for view in stored.stored_views if view]
        return (lambda epoch: stored.read("embedding", drawn[epoch % len(drawn)])[train.rows]) if drawn else None
    return partial(fresh_features, config, scored, dataset, train.rows)


def fresh_features(
    config: Config, scored: "ScoredModel", dataset: "Dataset", rows: "np.ndarray", epoch: int
) -> "np.ndarray":
    """(n, d) features of crops and flips never seen before, one for each of these rows."""
    import torch

    from compress_ssl.pipeline.extraction.features import view_features
    from compress_ssl.pipeline.runtime.device import choose_device, loader_workers
    from compress_ssl.pipeline.views.augment import ViewSpec
    from compress_ssl.pipeline.views.numbering import FRESH

    device = choose_device(config.device)
    embedder = scored.build_embedder().to(device).to(memory_format=torch.channels_last)  # as `embed` leaves it
    spec = ViewSpec("crop-flip", scored.views.seed, scored.views.crop_ratio)
    workers = loader_workers(config.workers, device)
    features, seen = view_features(embedder, dataset, spec, device, config.precision, FRESH + epoch, rows, workers)
    if len(seen) != len(rows):
        raise UserError(f"{len(rows) - len(seen)} training images can no longer be read; put them back")
    return features.cpu().numpy()


def write_report(
    config: Config, scored: "ScoredModel", metrics: dict[str, Any], results: dict[str, "Result"], train: "Split",
    val: "Split", train_data: "Dataset", val_data: "Dataset", out: Path,
) -> Path:  # fmt: skip
    from compress_ssl.pipeline.report import evaluation

    sets = {"train": train_data, "val": val_data}
    return evaluation.write_report(
        out,
        metrics,
        train=train,
        val=val,
        results=results,
        teacher=teacher_metrics(config, scored, metrics),
        curves=jsonl.read_jsonl(scored.run / "metrics.jsonl") if scored.run else None,
        load_image=lambda which, i: thumbnail(sets[which], i),
    )


def teacher_metrics(config: Config, scored: "ScoredModel", metrics: dict[str, Any]) -> dict[str, Any] | None:
    """The teacher's metrics.json, if it was scored on the same images."""
    place = config.teacher or scored.teacher_evaluation
    if place is None or not (place / "metrics.json").exists():
        if config.teacher:
            raise UserError(f"--teacher {config.teacher} holds no metrics.json; score the teacher first, with --store")
        return None
    teacher = artifact.read_json(Folder(place), "metrics.json")
    same = all(teacher["data"][k] == metrics["data"][k] for k in ("train_images", "val_images", "classes"))
    if not same:
        echo(f"{place} was scored on other images, so it is left out of the report")
    return teacher if same else None


def thumbnail(dataset: "Dataset", i: int) -> "np.ndarray":
    """A small picture of image i, (H, W, 3) uint8."""
    import numpy as np
    from PIL import Image

    image = Image.fromarray(dataset.load(i)[0])
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return np.asarray(image)


def headline(metrics: dict[str, Any]) -> str:
    """The scores in one line."""
    from compress_ssl.pipeline.report.metrics import headline_scores

    scores = "  ".join(f"{title} {value:.2f}" for title, value in headline_scores(metrics).items())
    return f"{metrics['model']['name']} ({metrics['model']['role']}): {scores or 'no labels, so no scores'}"
