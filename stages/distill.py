"""Feature store + images -> students: what they look at, who learns what, and what is delivered."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress_ssl.pipeline.distributed import launch
from compress_ssl.pipeline.runtime import artifact, launch_env
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.config import NOT_NEGATIVE, POSITIVE, flag, one_of, require, to_flags
from compress_ssl.pipeline.runtime.lease import require_free
from compress_ssl.pipeline.runtime.progress import echo, progress_bar
from compress_ssl.pipeline.runtime.storage import Folder, is_url, open_storage
from compress_ssl.pipeline.training import run_folders as roster

if TYPE_CHECKING:
    from compress_ssl.pipeline.datasets.base import Dataset
    from compress_ssl.pipeline.methods.base import Method, Recipe
    from compress_ssl.pipeline.models.embedder import Embedder
    from compress_ssl.pipeline.store.feature_store import FeatureStore
    from compress_ssl.pipeline.training.learner import Learner
    from compress_ssl.pipeline.training.run import TrainingRun
    from compress_ssl.pipeline.training.sampler import StepSampler

PER_STUDENT = {
    "student",
    "method",
    "out",
    "image_size",
    "views_per_step",
    "ema",
    "precision",
    "compile",
    "channels_last",
}
"""What may differ between commands that share a pass, besides what a recipe says."""


@dataclass(frozen=True)
class Config:
    """Train students to mimic the teacher's relative similarities, read from a store.

    Optimiser, rate, batch size and epochs default to the method's published recipe. The same
    command again continues; a larger --epochs trains on.
    """

    store: str = flag(help="the teacher's feature store: a folder, s3://BUCKET/PREFIX, ...")
    student: tuple[str, ...] = flag(help="timm:NAME, torchvision:NAME, cifar-resnet:20, ...; may be repeated")
    method: str = flag(help="compress-2q, compress-1q, seed, ... (compress methods lists them), python:module:Class")
    out: Path = flag(help="folder of the run; with several students, of their runs")
    data: str | None = flag(None, "the images, if they have moved since the export")
    epochs: float | None = flag(None, "passes over the images (default: as published)")
    steps: int | None = flag(None, "optimiser steps, instead of --epochs")
    batch_size: int | None = flag(None, "images per step on each device", short="-b")
    pairing: str = flag("same", "same, fresh or cross: how student and teacher views go together")
    views: int | None = flag(None, "use only views 0 to this-1 of the store (default: all it has now)")
    views_per_step: int | None = flag(None, "views of each image in a step, from one decode (default: the method's)")
    image_size: int | None = flag(None, "side in pixels (default: the student's own)")
    seed: int = flag(0, "of order, initial weights and everything random in a step")
    optimizer: str | None = flag(None, "sgd, adam, adamw or lars")
    lr: float | None = flag(None, "base learning rate (default: published, scaled with the batch)")
    momentum: float | None = flag(None, "of SGD; beta 1 of AdamW")
    weight_decay: float | None = flag(None)
    norm_decay: bool | None = flag(None, "weight decay on norms and biases too (default: as published)")
    schedule: str | None = flag(None, "cosine, step or constant")
    warmup_epochs: float | None = flag(None, "epochs of linear warm-up")
    clip: float | None = flag(None, "clip the gradient to this norm (default: as published, mostly not)")
    ema: float | None = flag(None, "average the student with this decay; the average is what is kept")
    precision: str = flag("fp32", "fp32, bf16, fp16; similarities are always fp32")
    compile: bool = flag(False, "torch.compile the student")
    channels_last: bool = flag(True, "memory format of images and student")
    val: str | None = flag(None, "labelled images for a nearest-neighbour check while training")
    val_every: float = flag(1.0, "epochs between checks")
    save_every: int = flag(500, "steps between checkpoints")
    workers: int | None = flag(None, "loader processes (default: one per core up to 16; 4 on CPU)", short="-j")
    cache_images: Path | None = flag(None, "a folder for decoded images: each is decoded once, not every epoch")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1")
    devices: int | None = flag(None, "train on so many devices of this machine; with torchrun leave it out")
    sync_bn: bool = flag(False, "on several CUDA devices, batch norm over the batches of all")
    allow_other_pixels: bool = flag(False, "train though this machine renders views differently from the exporting one")
    cache: Path | None = flag(None, "folder for the local copy of a remote store (default: the XDG cache)")
    overwrite: bool = flag(False, "start anew; an earlier run is set aside, not deleted")


class CannotSharePass(UserError):
    """These commands cannot share a pass over the images; each alone says why, or runs."""


class PartialFailure(UserError):
    """Some of several students diverged; the runs of the others are `finished`."""

    def __init__(self, message: str, finished: Sequence[Path]):
        super().__init__(message)
        self.finished = finished


def run(config: Config) -> dict[str, Any]:
    """Train to the end, or continue. Returns {"summary", "runs": [...], "steps"}; {} on ranks other than the first."""
    if config.devices and not launch_env.is_launched():
        check(config)
        return launch.launch_ranks(config.devices, ["distill", *to_flags(replace(config, devices=None))])
    return train_together([config])


def train_together(configs: Sequence[Config]) -> dict[str, Any]:
    """One pass over the images for all these commands, whose `looks` are equal. Returns what `run` does.

    Raises Apart if they cannot share it after all; nothing is trained then.
    """
    if not launch_env.is_launched():
        return distill(configs)
    from compress_ssl.pipeline.distributed import collectives

    with collectives.process_group():
        return distill(configs)


def distill(configs: Sequence[Config]) -> dict[str, Any]:
    """`share` in one process, alone or as one of several ranks."""
    for each in configs:
        check(each)
    config = configs[0]
    storage = open_storage(config.store)
    artifact.read(storage, "store")

    from compress_ssl.pipeline.distributed import collectives
    from compress_ssl.pipeline.store.feature_store import FeatureStore
    from compress_ssl.pipeline.store.local_cache import fetch

    store = FeatureStore(storage)
    dataset = open_images(config, store)
    val = open_val(config)
    if is_url(config.store):
        with collectives.rank_zero_first():
            store = fetch(store, [*views_used(config, store), *store.local], config.cache)
    plan = build_sampler(config, store)
    for each in configs:
        if views_used(each, store) != plan.views:
            raise CannotSharePass(f"{each.out} was begun with other views than {config.out}")
    try:
        training_run = prepare(configs, store, cached_images(config, dataset), plan)
    except UserError as problem:
        raise CannotSharePass(str(problem)) if len(configs) > 1 else problem from None
    finished = training_run.start >= plan.steps
    if not finished:
        train(config, training_run, val)
    return export_students(
        training_run, f"is finished already, {training_run.start} steps" if finished else f"{plan.steps} steps"
    )


def data_pass_key(config: Config) -> tuple[Any, ...]:
    """Equal for commands that one pass over the images can serve: they differ in students and how these learn."""
    recipe = recipe_of(config)
    free = {f.name for f in fields(recipe)} | PER_STUDENT
    same = [getattr(config, f.name) for f in fields(config) if f.name not in free]
    return (*same, recipe.batch_size, config.steps or recipe.epochs, views_per_step(config), reads(config))


def check(config: Config) -> None:
    """All that can be refused before torch is imported."""
    counts = ("steps", "batch_size", "views", "views_per_step", "image_size", "save_every", "devices")
    require(config, {name: POSITIVE for name in counts})
    finite = (lambda x: 0 < x < float("inf"), "must be more than 0 and finite")
    require(config, {name: finite for name in ("epochs", "val_every", "lr", "clip")})
    require(config, {"workers": NOT_NEGATIVE, "weight_decay": NOT_NEGATIVE, "warmup_epochs": NOT_NEGATIVE})
    require(
        config,
        {
            "pairing": one_of("same", "fresh", "cross"),
            "precision": one_of("fp32", "bf16", "fp16"),
            "optimizer": one_of("sgd", "adam", "adamw", "lars"),
            "schedule": one_of("cosine", "step", "constant"),
            "seed": (lambda x: 0 <= x < 2**64, "must be from 0 to 2**64 - 1"),
            "momentum": (lambda x: 0 <= x < 1, "must be at least 0 and less than 1"),
            "ema": (lambda x: 0 < x < 1, "must be between 0 and 1"),
        },
    )
    if config.devices and launch_env.is_launched():
        raise UserError("--devices starts ranks, and torchrun did so already; leave --devices out")
    if config.epochs and config.steps:
        raise UserError("--epochs and --steps were both given; keep one")
    from compress_ssl.pipeline.methods import METHODS
    from compress_ssl.pipeline.models import MODELS

    for student in config.student:
        MODELS.parse(student)
    METHODS.parse(config.method)
    if not config.student:
        raise UserError("no --student was given; name at least one, for example --student cifar-resnet:20")
    roster.require_run_folders(config.out, config.student, run_folders(config), config.overwrite)


def run_folders(config: Config) -> list[Path]:
    """Of each student."""
    return roster.run_folders(config.out, config.student, lambda: method_of(config).needs.peers)


def method_of(config: Config) -> "type[Method]":
    """The method's class: what it needs and its published recipe."""
    from compress_ssl.pipeline.methods import METHODS

    spec = METHODS.check(config.method, given=("context",))
    return METHODS.resolve(spec.kind).for_spec(spec.argument)  # type: ignore[attr-defined]


def recipe_of(config: Config) -> "Recipe":
    """The published recipe with the flags that were given."""
    recipe = method_of(config).recipe
    flags = [f.name for f in fields(recipe) if f.name != "drops"]
    return replace(recipe, **{n: v for n in flags if (v := getattr(config, n)) is not None})


def open_images(config: Config, store: "FeatureStore") -> "Dataset":
    """The images of the store, from where they are now."""
    from compress_ssl.pipeline.store import source_images

    dataset, unlike = source_images.open_store_images(store, config.data, allow_other_pixels=config.allow_other_pixels)
    if unlike:
        echo(f"warning: {unlike}")
    return dataset


def cached_images(config: Config, dataset: "Dataset") -> Any:
    """The images, decoded once into a folder, if that was asked for."""
    if config.cache_images is None:
        return dataset
    from compress_ssl.pipeline.datasets import image_cache
    from compress_ssl.pipeline.distributed import collectives

    lacking = image_cache.count_pending(dataset, config.cache_images)
    with collectives.rank_zero_first(), progress_bar("decode", len(dataset), "images", len(dataset) - lacking) as bar:
        return image_cache.build_cache(dataset, config.cache_images, bar.advance)


def open_val(config: Config) -> "Dataset | None":
    from compress_ssl.pipeline.datasets import DATASETS

    if config.val is None:
        return None
    val = DATASETS.build(config.val)
    if (val.label < 0).all():
        raise UserError(f"--val {config.val} has no labels, so nearest neighbours cannot be scored; leave --val out")
    return val


def build_sampler(config: Config, store: "FeatureStore") -> "StepSampler":
    """What every step looks at, and how many steps there are. A published batch size is that of all ranks together."""
    from compress_ssl.pipeline.distributed import collectives
    from compress_ssl.pipeline.training import sampler

    recipe = recipe_of(config)
    batch = recipe.batch_size * (collectives.world_size() if config.batch_size else 1)
    plan = sampler.make_sampler(
        store, views_used(config, store), seed=config.seed, batch=batch, views_per_step=views_per_step(config),
        pairing=config.pairing, epochs=recipe.epochs, steps=config.steps, reads=reads(config),
    )  # fmt: skip
    if plan.batch < batch:
        echo(f"batch of {plan.batch} instead of {batch}: that is all the usable images")
    return plan


def views_per_step(config: Config) -> int:
    """Views of an image that a step shows: peers that see views of their own share them out."""
    needs = method_of(config).needs
    each = config.views_per_step or needs.views
    if each < needs.views:
        raise UserError(f"{config.method} needs --views-per-step {needs.views} or more, not {each}")
    return each * (len(config.student) if needs.independent else 1)


def reads(config: Config) -> bool:
    """Whether the method looks at the teacher's features at all."""
    return bool(method_of(config).needs.arrays)


def views_used(config: Config, store: "FeatureStore") -> tuple[int, ...]:
    """Stored views to train on: the random ones if there are any, else the plain one.

    A run goes on with the views it began with, also when the store has grown since.
    """
    folder = Folder(run_folders(config)[0])
    begun = not config.overwrite and folder.exists(artifact.MANIFEST)
    total = config.views or (artifact.read(folder, "run")["about"]["views"] if begun else store.views)
    if total > store.views:
        raise UserError(f"--views {total} was asked, but {config.store} has {store.views}; export more, or use fewer")
    held = tuple(range(store.stored_views.start, total))
    if not held:
        raise UserError(f"--views {total} was asked, but {config.store} holds views from {store.stored_views.start} on")
    return tuple(v for v in held if v) or held


def prepare(configs: Sequence[Config], store: "FeatureStore", dataset: "Dataset", plan: "StepSampler") -> "TrainingRun":
    """Build the lessons, claim their folders, and go back to where they stopped."""
    from compress_ssl.pipeline.distributed import collectives
    from compress_ssl.pipeline.training.run import TrainingRun

    device = collectives.rank_device(configs[0].device)
    learners = [learner for config in configs for learner in build_learners(config, store, plan, device)]
    plan = plan.with_crops(store, [learner.method.needs for learner in learners])
    training_run = TrainingRun(store, dataset, plan, learners, device)
    training_run.require_sizes()
    if collectives.rank() == 0:  # only now, when nothing else can be refused
        for folder in [folder for config in configs if config.overwrite for folder in run_folders(config)]:
            require_free(Folder(folder))
            if aside := artifact.move_aside(folder, "run"):
                echo(f"set the earlier {folder} aside as {aside}")
    training_run.claim()
    training_run.restore()
    return training_run


def build_learners(config: Config, store: "FeatureStore", plan: "StepSampler", device: Any) -> list["Learner"]:
    """Each student with a method of its own, or all of them as peers in one; everything from the seed."""
    from compress_ssl.pipeline.distributed import collectives
    from compress_ssl.pipeline.methods import METHODS
    from compress_ssl.pipeline.methods.base import MethodContext
    from compress_ssl.pipeline.store import teacher_heads
    from compress_ssl.pipeline.training.learner import Learner, TrainingSettings
    from compress_ssl.pipeline.training.student import Student

    folders, learners, recipe = run_folders(config), [], recipe_of(config)
    training = TrainingSettings.of(
        recipe, plan, lr=config.lr, ema=config.ema, precision=config.precision, seed=config.seed
    )
    everyone = range(len(folders))
    for numbers in [everyone] if method_of(config).needs.peers else [[number] for number in everyone]:
        group = [Student(folders[n], build_student(config, n, device), config.ema) for n in numbers]
        context = MethodContext(
            [student.model for student in group], store.arrays, plan.rows, int(plan.epoch_views(0)[1][0]),
            config.seed, heads=teacher_heads.load_heads(store), images=store.images,
        )  # fmt: skip
        method = METHODS.build(config.method, context=context).to(device)
        method = collectives.convert_sync_batchnorm(method, device) if config.sync_bn else method
        method.check_inputs(config.method, store.arrays, config.pairing)
        for student in group:
            student.enable_outputs(method.needs.outputs, compiled=config.compile)
        learners.append(Learner(group, method, training, name=config.method, warmup_epochs=recipe.warmup_epochs))
        for note in context.notes:
            echo(note)
    return learners


def build_student(config: Config, number: int, device: Any) -> "Embedder":
    """A student from the seed; peers of one architecture begin with weights of their own."""
    import torch

    from compress_ssl.pipeline.distributed import collectives
    from compress_ssl.pipeline.models import build

    spec = config.student[number]
    torch.manual_seed(config.seed + config.student[:number].count(spec))
    embedder = build(spec, image_size=config.image_size, pretrained_default=False)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    embedder = embedder.to(device).to(memory_format=layout)
    return collectives.convert_sync_batchnorm(embedder, device) if config.sync_bn else embedder


def train(config: Config, training_run: "TrainingRun", val: "Dataset | None") -> None:
    """From where the session stands to its end."""
    from compress_ssl.pipeline.runtime.device import loader_workers
    from compress_ssl.pipeline.training.trainer import Trainer

    workers = loader_workers(config.workers, training_run.device, launch_env.local_world_size())
    Trainer(training_run, val, config.val_every, config.save_every, workers).train()


def export_students(training_run: "TrainingRun", what: str) -> dict[str, Any]:
    """Write the bare students and say what was made. Raises Partly if one of several diverged."""
    from compress_ssl.pipeline.distributed import collectives

    lines, runs = [], []
    taught = [(w, a) for w in training_run.learners if not w.failure for a in w.students]
    for learner, student in taught if collectives.rank() == 0 else []:
        file = student.export(learner.method.exported_head())
        best = f", best val nearest neighbour {student.best:.2f} %" if student.best >= 0 else ""
        lines.append(f"{student.folder}: {what}, {file.name}{best}")
        runs.append(str(student.folder))
    collectives.barrier()  # rank 0 has written
    if over := [learner.failure for learner in training_run.learners if learner.failure]:
        for line in lines:
            echo(line)
        others = [student.folder for _, student in taught]
        raise PartialFailure(f"{' '.join(over)}. The other {len(others)} students are finished", others)
    return {} if collectives.rank() else {"summary": "\n".join(lines), "runs": runs, "steps": training_run.plan.steps}
