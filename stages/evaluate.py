"""`compress evaluate`: a model's features on disk, scored by protocols, written as metrics.json and report.html."""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress_ssl.pipeline.models.choices import Precision
from compress_ssl.pipeline.runtime import artifact, jsonl
from compress_ssl.pipeline.runtime.config import NOT_NEGATIVE, POSITIVE, flag, require
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.lease import set_aside
from compress_ssl.pipeline.runtime.progress import echo
from compress_ssl.pipeline.runtime.storage import Folder, is_url, open_storage

if TYPE_CHECKING:
    import numpy as np

    from compress_ssl.pipeline.datasets.base import Dataset
    from compress_ssl.pipeline.evaluators.base import AugmentedFeatures, Evaluator, Split
    from compress_ssl.pipeline.evaluators.results import Result
    from compress_ssl.pipeline.evaluators.scored_model import ScoredModel
    from compress_ssl.pipeline.store.feature_store import FeatureStore

THUMBNAIL_SIDE = 96  # pixels: longest side of an image in the report, which shows it at 64 CSS pixels


@dataclass(frozen=True)
class Config:
    """Score a student, the teacher of a store, or any model: neighbours, clusters, linear probes, a classifier.

    Features, the FAISS index and finished protocols are kept on disk; the same command computes what is missing.
    """

    val: str = flag(
        help="The images to score, with labels: folder:PATH, digits:split=test, ...; a path alone means folder:PATH.",
        metavar="SPEC",
    )
    run: Path | None = flag(
        None, "Score the student of this run of compress distill. Default: give one of --run, --store, --model.",
        metavar="RUN",
    )  # fmt: skip
    store: str | None = flag(
        None, "Score the teacher of this feature store; its view 0 is used if stored. Default: as for --run.",
        metavar="STORE",
    )  # fmt: skip
    model: str | None = flag(
        None, "Score any model: timm:NAME, cifar-resnet:20, ... Default: as for --run.", metavar="SPEC"
    )
    train: str | None = flag(
        None, "The images for neighbours, clusters and probes. Default: those of the run or store.", metavar="SPEC"
    )
    limit: int | None = flag(
        None, "With --train: use only this many of its images, evenly spread, as the export does. Default: all."
    )
    protocol: tuple[str, ...] = flag(
        ("nn", "knn:k=20", "cluster", "linear"),
        "A protocol to score with (compress protocols lists them). Repeat the flag for several.",
        metavar="SPEC",
    )
    image_size: int | None = flag(
        None, "Side of the images in pixels. Default: as trained, or the model's own.", metavar="PIXELS"
    )

    batch_size: int = flag(64, "Images per forward pass.", panel="Speed", short="-b")
    workers: int | None = flag(
        None, "Loader processes. Default: one per core, at most 16; at most 4 if the model runs on the CPU.",
        panel="Speed", short="-j",
    )  # fmt: skip
    device: str = flag("auto", "Device of the model: auto, cpu, cuda or cuda:1.", panel="Speed", metavar="DEVICE")
    precision: Precision = flag("fp32", "Arithmetic of the model.", panel="Speed")
    cache: Path | None = flag(
        None, "The folder for the local copy of a store in a bucket. Default: compress in the XDG cache.",
        panel="Speed", metavar="FOLDER",
    )  # fmt: skip

    out: Path | None = flag(
        None,
        "The folder to write. Default: RUN/evaluation or STORE-evaluation; for a store in a bucket, the latter in the "
        "current folder.",
        panel="Output",
        metavar="FOLDER",
    )
    teacher: Path | None = flag(
        None,
        "The teacher's evaluation, shown beside the scores in the report. Default: the one beside the run's store, if "
        "there is one.",
        panel="Output",
        metavar="FOLDER",
    )
    overwrite: bool = flag(False, "Start anew. An earlier evaluation is moved aside, not deleted.", panel="Output")


def run(config: Config) -> dict[str, Any]:
    """Compute what is missing. Returns {"summary", "evaluation": the folder, "metrics": those of metrics.json}.

    Raises UserError for what the user can mend, before any feature is computed where that is possible.
    """
    config = convert_paths(config)
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
        set_aside(out, "evaluation")  # after the checks: a refused command moves nothing
    artifact.claim(Folder(out), "evaluation", identity, about)

    from compress_ssl.pipeline.evaluators import split_features

    settings = split_features.EmbedSettings(config.batch_size, config.workers, config.device, config.precision)
    train, val = split_features.load_splits(scored, settings, train_data, val_data, out / "features")
    augmented = split_features.make_augmenter(scored, settings, train_data, train.rows)
    scores, results = run_protocols(evaluators, train, val, augmented, out)
    metrics = {"model": scored.model, "data": describe_data(about, train, val), **scores}
    Folder(out).put("metrics.json", json.dumps(metrics, indent=1).encode() + b"\n")

    from compress_ssl.pipeline.report import evaluation

    page = evaluation.write_report(
        out,
        metrics,
        train=train,
        val=val,
        results=results,
        teacher=read_teacher_metrics(config, scored, metrics),
        curves=jsonl.read_jsonl(scored.run / "metrics.jsonl") if scored.run else None,
        load_image=partial(load_thumbnail, {"train": train_data, "val": val_data}),
    )
    return {"summary": f"{summarize(metrics)}\n{page}", "evaluation": str(out), "metrics": metrics}


# ---------------------------------------------------------------- flags


def convert_paths(config: Config) -> Config:
    """The same flags with folders as paths: a caller from Python may give strings."""
    return replace(
        config,
        run=Path(config.run) if config.run else None,
        cache=Path(config.cache) if config.cache else None,
        out=Path(config.out) if config.out else None,
        teacher=Path(config.teacher) if config.teacher else None,
    )


def check_flags(config: Config) -> None:
    """Check flags, specs and manifests: all that needs no torch, so that a typing error is reported at once.

    Raises UserError.
    """
    require(config, {"batch_size": POSITIVE, "image_size": POSITIVE, "limit": POSITIVE, "workers": NOT_NEGATIVE})
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
    return config.train or str(scored.data.spec if scored.data else None)


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
    config: Config, scored: "ScoredModel", earlier: artifact.Manifest, train: "Dataset", val: "Dataset"
) -> None:
    """Raises Mismatch if an earlier evaluation in the folder was made from other images.

    earlier: its manifest. The claim of the folder would refuse them too, but without naming the images.
    """
    for which, dataset, spec in (("train", train, train_spec(config, scored)), ("val", val, config.val)):
        if earlier.identity["data"][which] != dataset.fingerprint:
            raise artifact.Mismatch(
                f"{config.out or scored.default_out} was made with the {which} images of {earlier.about[which]} as "
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


# ---------------------------------------------------------------- scores


def run_protocols(
    evaluators: dict[str, "Evaluator"], train: "Split", val: "Split", augmented: "AugmentedFeatures | None", out: Path
) -> tuple[dict[str, Any], dict[str, "Result"]]:
    """(scores for metrics.json, results by protocol spec). Protocols of earlier commands in OUT are included.

    A protocol with a finished result in OUT/results is not run again.
    """
    from compress_ssl.pipeline.evaluators.results import Results

    results = Results(Folder(out))
    for spec, evaluator in evaluators.items():
        if results.get(evaluator) is None:
            results.put(evaluator, spec, evaluator(train, val, out, augmented))
    return results.gather(evaluators.values())


def describe_data(about: dict[str, Any], train: "Split", val: "Split") -> dict[str, Any]:
    """What metrics.json says of the images: specs (those in `about`), numbers of usable images, number of classes."""
    return {
        "train": about["train"],
        "train_images": len(train),
        "val": about["val"],
        "val_images": len(val),
        "classes": len(train.classes),
    }


# ---------------------------------------------------------------- report


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


def load_thumbnail(sets: dict[str, "Dataset"], which: str, i: int) -> "np.ndarray":
    """Image i of the data set `which` ("train" or "val"), reduced to at most THUMBNAIL_SIDE pixels, (H, W, 3) uint8."""
    import numpy as np
    from PIL import Image

    image = Image.fromarray(sets[which].load(i)[0])
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return np.asarray(image)


def summarize(metrics: dict[str, Any]) -> str:
    """The model and its scores in one line."""
    from compress_ssl.pipeline.report.metrics import headline_scores

    scores = "  ".join(f"{title} {value:.2f}" for title, value in headline_scores(metrics).items())
    return f"{metrics['model']['name']} ({metrics['model']['role']}): {scores or 'no labels, so no scores'}"
