"""`compress evaluate`: a model's features on disk, scored by protocols, written as metrics.json and report.html."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress_ssl.pipeline.runtime import artifact, jsonl
from compress_ssl.pipeline.runtime.config import NOT_NEGATIVE, POSITIVE, flag, one_of, require
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.progress import echo, progress_bar
from compress_ssl.pipeline.runtime.signals import StopRequest
from compress_ssl.pipeline.runtime.storage import Folder, is_url, open_storage

if TYPE_CHECKING:
    import numpy as np

    from compress_ssl.pipeline.datasets.base import Dataset
    from compress_ssl.pipeline.evaluators.base import Evaluator, Split
    from compress_ssl.pipeline.evaluators.results import Result
    from compress_ssl.pipeline.evaluators.scored_model import ScoredModel
    from compress_ssl.pipeline.store.feature_store import FeatureStore

THUMBNAIL_SIDE = 96  # pixels: longest side of an image in the report, which shows it at 64 CSS pixels


@dataclass(frozen=True)
class Config:
    """Score a student, the teacher of a store, or any model: neighbours, clusters, linear probes, a classifier.

    Features, the FAISS index and finished protocols are kept on disk; the same command computes what is missing.
    """

    val: str = flag(help="images to score, with labels: folder:PATH, digits:split=test, ...")
    train: str | None = flag(None, "images for neighbours, clusters and probes (default: those of the run or store)")
    limit: int | None = flag(None, "with --train: use only this many of them, evenly spread, as the export does")
    run: Path | None = flag(None, "a run of compress distill, whose student is scored")
    store: str | None = flag(None, "a feature store, whose teacher is scored; its view 0 is used if stored")
    cache: Path | None = flag(None, "with --store URL: the folder of its local copy (default: the XDG cache)")
    model: str | None = flag(None, "any model to score: timm:NAME, cifar-resnet:20, ...")
    protocol: tuple[str, ...] = flag(("nn", "knn:k=20", "cluster", "linear"), "score with nn, knn:k=20, cluster, ...")
    out: Path | None = flag(None, "folder to write (default: RUN/evaluation or STORE-evaluation; in . for a URL)")
    teacher: Path | None = flag(None, "the teacher's evaluation, shown beside the scores in the report")
    image_size: int | None = flag(None, "side of the images in pixels (default: as trained, or the model's own)")
    batch_size: int = flag(64, "images per forward pass", short="-b")
    workers: int | None = flag(None, "loader processes (default: one per core, at most 16; 4 on CPU)", short="-j")
    device: str = flag("auto", "device of the model: auto, cpu, cuda, cuda:1")
    precision: str = flag("fp32", "arithmetic of the model: fp32, bf16, fp16")
    overwrite: bool = flag(False, "start anew; an earlier evaluation is set aside, not deleted")


def run(config: Config) -> dict[str, Any]:
    """Compute what is missing. Returns {"summary", "evaluation": the folder, "metrics": those of metrics.json}.

    Raises UserError for what the user can mend, before any feature is computed where that is possible.
    """
    check_flags(config)
    from compress_ssl.pipeline.evaluators import PROTOCOLS

    evaluators = {spec: PROTOCOLS.build(spec) for spec in config.protocol}
    scored = open_scored_model(config, any(evaluator.needs_augmented for evaluator in evaluators.values()))
    out = config.out or scored.default_out
    replaces = config.overwrite and artifact.replaceable(out, "evaluation")
    earlier = None if replaces else artifact.claimed(Folder(out), "evaluation")
    train_data, val_data = open_datasets(config, scored)
    if earlier:
        require_same_images(config, scored, earlier, train_data, val_data)
    check_protocols(evaluators, scored, train_data, val_data)

    from compress_ssl.pipeline.runtime.device import choose_device

    choose_device(config.device)
    identity = {
        "model": {"weights": scored.weights, "preprocessing": scored.preprocessing},
        "crop_ratio": scored.views.crop_ratio,
        "data": {"train": train_data.fingerprint, "val": val_data.fingerprint},
        "precision": config.precision,
    }
    about = {"model": scored.model, "train": train_spec(config, scored), "val": config.val}
    if config.overwrite:
        aside = artifact.move_aside(out, "evaluation")  # after the checks: a refused command moves nothing
        if aside:
            echo(f"set the earlier {out} aside as {aside}")
    artifact.claim(Folder(out), "evaluation", identity, about)
    train, val = load_splits(config, scored, train_data, val_data, out)
    metrics, results = run_protocols(config, scored, evaluators, train, val, train_data, out)
    Folder(out).put("metrics.json", json.dumps(metrics, indent=1).encode() + b"\n")
    page = write_report(config, scored, metrics, results, train, val, train_data, val_data, out)
    return {"summary": f"{summarize(metrics)}\n{page}", "evaluation": str(out), "metrics": metrics}


# ---------------------------------------------------------------- flags


def check_flags(config: Config) -> None:
    """Check flags, specs and manifests: all that needs no torch, so that a typing error is reported at once.

    Raises UserError.
    """
    require(config, {"batch_size": POSITIVE, "image_size": POSITIVE, "limit": POSITIVE, "workers": NOT_NEGATIVE})
    require(config, {"precision": one_of("fp32", "bf16", "fp16")})
    given = [name for name in ("run", "store", "model") if getattr(config, name)]
    if len(given) != 1:
        raise UserError(f"give one of --run, --store and --model; given: {' and '.join(given) or 'none'}")
    if config.model and not (config.out and config.train):
        raise UserError(
            "--model needs --train and --out: a model spec names neither training images nor a folder to write"
        )
    if config.limit and not config.train:
        raise UserError("--limit needs --train: the images of a run or store are always those it was made from")
    if config.store and config.image_size:
        raise UserError("--image-size cannot be used with --store: its features are stored at one size; leave it out")
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


# ---------------------------------------------------------------- model and images


def open_scored_model(config: Config, augment: bool) -> "ScoredModel":
    """The model that --run, --store or --model names; `augment`: a protocol needs random views too."""
    from compress_ssl.pipeline.evaluators import scored_model

    if config.run:
        return scored_model.open_run(config.run, config.image_size)
    if config.store:
        return scored_model.open_teacher(open_store(config, config.store, augment))
    assert config.model and config.out
    return scored_model.open_model(config.model, config.image_size, config.out)


def open_store(config: Config, location: str, augment: bool) -> "FeatureStore":
    """The store at a path or URL; of a URL, a local copy of view 0 or, with `augment`, of all stored views."""
    from compress_ssl.pipeline.store.feature_store import FeatureStore
    from compress_ssl.pipeline.store.local_cache import fetch

    store = FeatureStore(open_storage(location))
    used = store.stored_views if augment else [v for v in store.stored_views if v == 0]
    return fetch(store, used, config.cache) if is_url(location) else store


def train_spec(config: Config, scored: "ScoredModel") -> str:
    """The spec of the training images, as it is written to metrics.json."""
    return config.train or str((scored.data or {}).get("spec"))


def open_datasets(config: Config, scored: "ScoredModel") -> tuple["Dataset", "Dataset"]:
    """(training images, validation images).

    Raises UserError if the images of a run or store have moved or changed, or if --val has a class that labelled
    training images lack: no protocol could predict it.
    """
    from compress_ssl.pipeline.datasets import DATASETS
    from compress_ssl.pipeline.store import source_images

    if config.train:
        train = DATASETS.build(config.train)
        train = train.subset(config.limit) if config.limit else train
    else:
        assert scored.data
        of = str(config.run or config.store)
        ids = scored.sample_ids or tuple
        train = source_images.open_recorded(scored.data, ids, given=None, flag="--train", of=of)
    val = DATASETS.build(config.val)
    unknown = [name for name in val.classes if name not in train.classes]
    if unknown and (train.label >= 0).any():
        raise UserError(
            f"{len(unknown)} of {len(val.classes)} classes of --val {config.val} are not among the training images, "
            f"the first is {unknown[0]!r}; give training images of all classes with --train, or remove these classes "
            "from --val"
        )
    return train, val


def require_same_images(
    config: Config, scored: "ScoredModel", earlier: dict[str, Any], train: "Dataset", val: "Dataset"
) -> None:
    """Raises Mismatch if an earlier evaluation in the folder was made from other images.

    earlier: its manifest. The claim of the folder would refuse them too, but without naming the images.
    """
    for which, dataset, spec in (("train", train, train_spec(config, scored)), ("val", val, config.val)):
        if earlier["identity"]["data"][which] != dataset.fingerprint:
            raise artifact.Mismatch(
                f"{config.out or scored.default_out} was made with the {which} images of {earlier['about'][which]} as "
                f"they were then, and those of {spec} are others; choose another --out, or start anew with --overwrite"
            )


def check_protocols(
    evaluators: dict[str, "Evaluator"], scored: "ScoredModel", train: "Dataset", val: "Dataset"
) -> None:
    """Raises UserError for a protocol that is for another model or lacks labels, before features are computed."""
    from compress_ssl.pipeline.evaluators.base import require_labels

    sets = {"training": train, "validation": val}
    for spec, evaluator in evaluators.items():
        if evaluator.model_digest not in ("", scored.weights):
            raise UserError(
                f"--protocol {spec} was made for another model than {scored.model['name']}; give the head of this "
                "one: its run's head.safetensors, or one made from its store with compress label-head"
            )
        require_labels(spec, **{which: sets[which] for which in evaluator.needs_labels})


# ---------------------------------------------------------------- features


def load_splits(
    config: Config, scored: "ScoredModel", train: "Dataset", val: "Dataset", out: Path
) -> tuple["Split", "Split"]:
    """(training split, validation split) of view 0. Features that are not stored yet are computed into OUT/features.

    Both splits share one list of classes: those of the training images, then those that only the validation images
    have (possible only if the training images have no labels).
    """
    classes = (*train.classes, *(name for name in val.classes if name not in train.classes))
    first = scored.find_store(train) or embed_dataset(config, scored, train, out / "features" / "train")
    second = scored.find_store(val) or embed_dataset(config, scored, val, out / "features" / "val")
    return build_split(first, train, classes), build_split(second, val, classes)


def embed_dataset(config: Config, scored: "ScoredModel", dataset: "Dataset", folder: Path) -> "FeatureStore":
    """The scored model's features of view 0, as a store with one view in float32, resumed where it stopped."""
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
    if store.pending():
        embed_pending(config, scored, dataset, store, folder.name)
    return store


def embed_pending(config: Config, scored: "ScoredModel", dataset: "Dataset", store: "FeatureStore", title: str) -> None:
    """Compute the features that a store lacks, with a progress bar. A stop signal keeps those of complete shards."""
    from compress_ssl.pipeline.extraction.embed import FeatureExtractor, embed
    from compress_ssl.pipeline.runtime.device import choose_device, loader_workers

    device = choose_device(config.device)
    missing = sum(shard.stop - shard.start for shard in store.pending())  # images
    done = store.images - missing
    with StopRequest() as stop, progress_bar(f"features {title}", store.images, "images", done) as bar:
        forward = FeatureExtractor(scored.build_embedder(), device, config.precision, config.batch_size)
        workers = loader_workers(config.workers, device)
        embed(
            store, dataset, scored.views, forward, workers=workers, progress=bar.advance,
            stopped=lambda: stop.requested,
        )  # fmt: skip
        stop.check("the features so far are kept; repeat the command to continue")


def build_split(store: "FeatureStore", dataset: "Dataset", classes: tuple[str, ...]) -> "Split":
    """The usable images of a store's view 0, with labels as numbers into `classes`, joined by class name.

    Raises UserError if no image is usable.
    """
    import numpy as np

    from compress_ssl.pipeline.datasets.decode import GOOD
    from compress_ssl.pipeline.evaluators.base import Split

    rows = np.flatnonzero(store.table("status") == GOOD)
    if not len(rows):
        _, name, why = store.bad_images()[0]
        raise UserError(
            f"none of the {len(dataset)} images of {store.storage} can be used, the first is {name}: {why}; "
            "repair the files, then repeat the command with another --out"
        )
    if len(rows) < len(dataset):
        echo(f"{len(dataset) - len(rows)} of {len(dataset)} images cannot be used and are left out")
    number = {name: y for y, name in enumerate(classes)}
    # One more entry at the end: a label of -1 (none) indexes it and stays -1.
    joined = np.array([number.get(name, -1) for name in dataset.classes] + [-1], np.int64)
    return Split(store.read("embedding", 0)[rows], joined[dataset.label[rows]], rows, classes)


# ---------------------------------------------------------------- scores


def run_protocols(
    config: Config, scored: "ScoredModel", evaluators: dict[str, "Evaluator"], train: "Split", val: "Split",
    train_data: "Dataset", out: Path,
) -> tuple[dict[str, Any], dict[str, "Result"]]:  # fmt: skip
    """(contents of metrics.json, results by protocol spec). Protocols of earlier commands in OUT are included.

    A protocol with a finished result in OUT/results is not run again.
    """
    from compress_ssl.pipeline.evaluators.results import Results

    metrics: dict[str, Any] = {
        "model": scored.model,
        "data": {
            "train": train_spec(config, scored), "train_images": len(train),
            "val": config.val, "val_images": len(val), "classes": len(train.classes),
        },
    }  # fmt: skip
    results, augmented = Results(Folder(out)), make_augmenter(config, scored, train, train_data)
    for spec, evaluator in evaluators.items():
        if results.get(evaluator) is None:
            results.put(evaluator, spec, evaluator(train, val, out, augmented))
    scores, found = results.gather(evaluators.values())
    return metrics | scores, found


def make_augmenter(
    config: Config, scored: "ScoredModel", train: "Split", dataset: "Dataset"
) -> "Callable[[int], np.ndarray] | None":
    """epoch -> (n, d) features of another random view of every training image; None if none can be had.

    With a store that holds these images, its stored random views are used in turn; a store of view 0 alone has none.
    Otherwise the images are embedded again in every epoch, in a new random crop and flip.
    """
    store = scored.find_store(dataset)
    if store is not None:
        return stored_view_reader(store, train.rows)
    return partial(embed_random_view, config, scored, dataset, train.rows)


def stored_view_reader(store: "FeatureStore", rows: "np.ndarray") -> "Callable[[int], np.ndarray] | None":
    """epoch -> (n, d) stored features of these rows in a random view, a different one for each of V - 1 epochs."""
    random_views = [view for view in store.stored_views if view]  # view 0 is the centre crop
    if not random_views:
        return None
    return lambda epoch: store.read("embedding", random_views[epoch % len(random_views)])[rows]


def embed_random_view(
    config: Config, scored: "ScoredModel", dataset: "Dataset", rows: "np.ndarray", epoch: int
) -> "np.ndarray":
    """(n, d) features of these rows in random crops and flips, other ones in every epoch.

    The view numbers carry the bit FRESH, so none of them is a stored view. Raises UserError if an image cannot be
    read any more.
    """
    import torch

    from compress_ssl.pipeline.extraction.features import view_features
    from compress_ssl.pipeline.runtime.device import choose_device, loader_workers
    from compress_ssl.pipeline.views.augment import ViewSpec
    from compress_ssl.pipeline.views.numbering import FRESH

    device = choose_device(config.device)
    embedder = scored.build_embedder().to(device).to(memory_format=torch.channels_last)  # as FeatureExtractor sets it
    spec = ViewSpec("crop-flip", scored.views.seed, scored.views.crop_ratio)
    workers = loader_workers(config.workers, device)
    features, embedded_rows = view_features(
        embedder, dataset, spec, device, config.precision, FRESH + epoch, rows, workers
    )
    if len(embedded_rows) != len(rows):
        raise UserError(f"{len(rows) - len(embedded_rows)} training images can no longer be read; restore them")
    return features.cpu().numpy()


# ---------------------------------------------------------------- report


def write_report(
    config: Config, scored: "ScoredModel", metrics: dict[str, Any], results: dict[str, "Result"], train: "Split",
    val: "Split", train_data: "Dataset", val_data: "Dataset", out: Path,
) -> Path:  # fmt: skip
    """Write report.html and its figures; returns the path of the page."""
    from compress_ssl.pipeline.report import evaluation

    sets = {"train": train_data, "val": val_data}
    return evaluation.write_report(
        out,
        metrics,
        train=train,
        val=val,
        results=results,
        teacher=read_teacher_metrics(config, scored, metrics),
        curves=jsonl.read_jsonl(scored.run / "metrics.jsonl") if scored.run else None,
        load_image=lambda which, i: load_thumbnail(sets[which], i),
    )


def read_teacher_metrics(config: Config, scored: "ScoredModel", metrics: dict[str, Any]) -> dict[str, Any] | None:
    """The teacher's metrics.json if there is one of as many images and classes, else None.

    Raises UserError if --teacher names a folder without one.
    """
    folder = config.teacher or scored.teacher_evaluation
    if folder is None or not (folder / "metrics.json").exists():
        if config.teacher:
            raise UserError(f"--teacher {config.teacher} holds no metrics.json; score the teacher first, with --store")
        return None
    teacher = artifact.read_json(Folder(folder), "metrics.json")
    # Counts and not paths: the same images may be reached by another path on another machine.
    same = all(teacher["data"][key] == metrics["data"][key] for key in ("train_images", "val_images", "classes"))
    if not same:
        echo(f"{folder} was scored on other images, so it is left out of the report")
    return teacher if same else None


def load_thumbnail(dataset: "Dataset", i: int) -> "np.ndarray":
    """Image i reduced to at most THUMBNAIL_SIDE pixels, (H, W, 3) uint8."""
    import numpy as np
    from PIL import Image

    image = Image.fromarray(dataset.load(i)[0])
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return np.asarray(image)


def summarize(metrics: dict[str, Any]) -> str:
    """The model and its scores in one line."""
    from compress_ssl.pipeline.report.metrics import headline_scores

    scores = "  ".join(f"{title} {value:.2f}" for title, value in headline_scores(metrics).items())
    return f"{metrics['model']['name']} ({metrics['model']['role']}): {scores or 'no labels, so no scores'}"
