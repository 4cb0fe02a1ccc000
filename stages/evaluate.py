"""`compress evaluate`: a model's features on disk, scored by protocols, written as metrics.json and report.html."""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from compress_ssl.pipeline.evaluators.record import (
    FLAGS,
    METRICS,
    DataRecord,
    Evaluation,
    EvaluationAbout,
    EvaluationIdentity,
    EvaluationRecord,
    FingerprintsRecord,
    WeightsRecord,
    on_same_images,
    read_evaluation_record,
    read_teacher,
    require_same_inputs,
)
from compress_ssl.pipeline.runtime import artifact, jsonl
from compress_ssl.pipeline.runtime.choices import Precision
from compress_ssl.pipeline.runtime.config import NOT_NEGATIVE, POSITIVE, CommandResult, flag, require
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.lease import set_aside
from compress_ssl.pipeline.runtime.records import to_json
from compress_ssl.pipeline.runtime.storage import Folder, open_storage

if TYPE_CHECKING:
    from compress_ssl.pipeline.datasets.base import Dataset
    from compress_ssl.pipeline.evaluators.base import Evaluator
    from compress_ssl.pipeline.evaluators.scored_model import ScoredModel
    from compress_ssl.pipeline.evaluators.split_features import EmbedSettings

BATCH_SIZE = 64  # images per forward pass of an evaluation that begins now
PRECISION: Precision = "fp32"  # likewise


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
        None,
        "Score the student of this run of compress distill. Give one of --run, --store and --model. Default: none.",
        metavar="RUN",
    )
    store: str | None = flag(
        None, "Score the teacher of this feature store; its view 0 is used if stored. Default: none.",
        metavar="STORE",
    )  # fmt: skip
    model: str | None = flag(None, "Score any model: timm:NAME, cifar-resnet:20, ... Default: none.", metavar="SPEC")
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
        None,
        "Side of the images in pixels. Default: as this evaluation began, else as trained, or the model's own.",
        metavar="PIXELS",
    )

    batch_size: int | None = flag(
        None, "Images per forward pass. Default: as this evaluation began, else 64.", panel="Speed", short="-b"
    )
    workers: int | None = flag(
        None, "Loader processes. Default: one per core, at most 16; at most 4 if the model runs on the CPU.",
        panel="Speed", short="-j",
    )  # fmt: skip
    device: str = flag("auto", "Device of the model: auto, cpu, cuda or cuda:1.", panel="Speed", metavar="DEVICE")
    precision: Precision | None = flag(
        None, "Arithmetic of the model. Default: as this evaluation began, else fp32.", panel="Speed"
    )
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


def run(config: Config) -> CommandResult:
    """Compute what is missing. Returns {"summary", "evaluation": the folder, "metrics": those of metrics.json}.

    Raises UserError for what the user can mend, before any feature is computed where that is possible.
    """
    job = resolve(config)
    folder = Folder(job.out)
    if config.overwrite:
        set_aside(job.out, "evaluation")  # after the checks: a refused command moves nothing
    artifact.claim(folder, "evaluation", to_json(job.record.identity), to_json(job.record.about), FLAGS)

    from compress_ssl.pipeline.evaluators import scoring, split_features
    from compress_ssl.pipeline.report import evaluation as pages
    from compress_ssl.pipeline.report.image_grids import load_thumbnail

    scored, settings = job.scored, job.settings
    train, val = split_features.load_splits(scored, settings, job.train, job.val, job.out / "features")
    augmented = split_features.make_augmenter(scored, settings, job.train, train.rows)
    gathered = scoring.score_all(job.evaluators, train, val, augmented, job.out)
    about = job.record.about
    data = DataRecord(about.train, len(train), about.val, len(val), len(train.classes))
    evaluation = Evaluation(about.model, data, gathered.scores, gathered.protocols)
    metrics = evaluation.to_json()
    folder.put(METRICS, json.dumps(metrics, indent=1).encode() + b"\n")
    page = pages.write_report(
        job.out,
        evaluation,
        gathered.figures,
        splits={"train": train, "val": val},
        teacher=on_same_images(job.teacher, data),
        curves=jsonl.read_jsonl(scored.run / "metrics.jsonl") if scored.run else None,
        load_image=partial(load_thumbnail, {"train": job.train, "val": job.val}),
    )
    return {"summary": f"{evaluation.summary}\n{page}", "evaluation": str(job.out), "metrics": metrics}


# ---------------------------------------------------------------- what is to be done


@dataclass(frozen=True, eq=False)
class Job:
    """A command with everything named in it opened, and with what is recorded in a folder that has begun."""

    out: Path
    record: EvaluationRecord  # what the folder is to say of itself
    scored: "ScoredModel"
    train: "Dataset"
    val: "Dataset"
    evaluators: "dict[str, Evaluator]"  # by spec
    settings: "EmbedSettings"
    teacher: Evaluation | None  # the teacher's, if it has one


def resolve(config: Config) -> Job:
    """The job that a command names. Nothing is written.

    Raises UserError for flags that contradict each other, for what is not there, and for an evaluation in the folder
    that was made from other images.
    """
    config = convert_paths(config)
    check_flags(config)
    from compress_ssl.pipeline.evaluators import PROTOCOLS, scoring
    from compress_ssl.pipeline.evaluators.begun import build_protocol
    from compress_ssl.pipeline.evaluators.scored_model import open_splits
    from compress_ssl.pipeline.evaluators.split_features import EmbedSettings, recorded_batch_size
    from compress_ssl.pipeline.runtime.device import choose_device

    evaluators = {spec: PROTOCOLS.build(spec) for spec in config.protocol}
    out = config.out or default_out(config)
    earlier = read_earlier(config, out)
    if earlier:
        evaluators = {spec: build_protocol(spec, out) for spec in config.protocol}
    scored = open_scored_model(config, earlier, any(evaluator.needs_augmented for evaluator in evaluators.values()))
    train, val = open_splits(scored, config.train, config.limit, config.val)
    precision = config.precision or (earlier.identity.precision if earlier else PRECISION)
    batch_size = config.batch_size or (recorded_batch_size(out / "features") if earlier else None) or BATCH_SIZE
    record = EvaluationRecord(
        EvaluationIdentity(
            WeightsRecord(scored.weights, scored.preprocessing),
            scored.views.crop_ratio,
            FingerprintsRecord(train.fingerprint, val.fingerprint),
            precision,
        ),
        EvaluationAbout(scored.model, config.train or str(scored.data and scored.data.spec), config.val),
    )
    if earlier:
        require_same_inputs(earlier, record, str(out))
    scoring.require_distinct(evaluators)
    scoring.require_fitting(evaluators, scored.model.name, scored.weights, train, val)
    choose_device(config.device)
    settings = EmbedSettings(batch_size, config.workers, config.device, precision)
    teacher = read_teacher(config.teacher, scored.teacher_evaluation)
    return Job(out, record, scored, train, val, evaluators, settings, teacher)


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


# ---------------------------------------------------------------- what is recorded


def default_out(config: Config) -> Path:
    """The folder of an evaluation whose --out is not given."""
    if config.run:
        return config.run / "evaluation"
    return artifact.sibling(str(open_storage(str(config.store))), "-evaluation")


def read_earlier(config: Config, out: Path) -> EvaluationRecord | None:
    """The record of an evaluation that has begun in the folder; None if there is none, or with --overwrite.

    Raises UserError if the folder holds anything else.
    """
    if config.overwrite and artifact.replaceable(out, "evaluation"):
        return None
    manifest = artifact.claimed(Folder(out), "evaluation")
    return read_evaluation_record(manifest, str(out)) if manifest else None


# ---------------------------------------------------------------- model and images


def open_scored_model(config: Config, earlier: EvaluationRecord | None, augment: bool) -> "ScoredModel":
    """The model that --run, --store or --model names.

    earlier: the evaluation that has begun; its image size counts where none is given. augment: a protocol needs random
    views too.
    """
    from compress_ssl.pipeline.evaluators import scored_model

    recorded = earlier.identity.model.preprocessing if earlier else None
    image_size = config.image_size or (recorded.size if recorded else None)
    if config.run:
        return scored_model.open_run(config.run, image_size)
    if config.store:
        return scored_model.open_teacher(scored_model.open_store(config.store, config.cache, augment))
    assert config.model
    return scored_model.open_model(config.model, image_size, recorded)
