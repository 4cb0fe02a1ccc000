"""`compress distill`: train students from a feature store and its images, and export their weights.

From the command to the place where a loss is computed:

    run -> train -> Trainer.train           the loop: pixels, one step, logs, checkpoints (training/trainer.py)
        -> TrainingRun.step                 one step of all learners of the run          (training/run.py)
        -> Learner.step                     one step of one method with its students     (training/learner.py)
        -> DistillationModule.forward       students and method as one module (training/distillation_module.py)
        -> Method.forward                   the loss of a batch                          (methods/)

One pass over the images may serve several commands (a sweep): each image is decoded once for all their students.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress_ssl.pipeline.distributed import launch
from compress_ssl.pipeline.methods import METHODS, find_method
from compress_ssl.pipeline.models import MODELS
from compress_ssl.pipeline.models.choices import Precision
from compress_ssl.pipeline.runtime import artifact, launch_env
from compress_ssl.pipeline.runtime.config import NOT_NEGATIVE, POSITIVE, flag, require, to_flags
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.lease import set_aside
from compress_ssl.pipeline.runtime.progress import echo
from compress_ssl.pipeline.runtime.storage import is_url, open_storage
from compress_ssl.pipeline.training.choices import OptimizerName, Pairing
from compress_ssl.pipeline.training.export_students import export_students
from compress_ssl.pipeline.training.run_folders import count_begun_views, list_run_folders, require_run_folders
from compress_ssl.pipeline.training.schedule import ScheduleKind

if TYPE_CHECKING:
    import torch

    from compress_ssl.pipeline.datasets.base import Dataset
    from compress_ssl.pipeline.methods.base import Recipe
    from compress_ssl.pipeline.store.feature_store import FeatureStore
    from compress_ssl.pipeline.training.learner import Learner
    from compress_ssl.pipeline.training.run import TrainingRun
    from compress_ssl.pipeline.training.sampler import StepSampler

PER_STUDENT = {
    "student", "method", "out", "image_size", "views_per_step", "ema", "precision", "compile", "channels_last",
}  # fmt: skip
"""Names of flags that may differ between commands that share a pass, besides those that override a recipe."""


@dataclass(frozen=True)
class Config:
    """Train students to reproduce the teacher's similarities between images, read from a feature store.

    Optimizer, learning rate, batch size and epochs default to the method's published recipe. Running the same
    command again continues an interrupted run; a larger --epochs makes a finished run longer.
    """

    store: str = flag(
        help="The teacher's feature store: a folder, or s3://BUCKET/PREFIX, gs:// or az://.", metavar="STORE"
    )
    student: tuple[str, ...] = flag(
        help="A student: timm:NAME, torchvision:NAME, cifar-resnet:20, ... (compress models lists the kinds). Repeat "
        "the flag for several students.",
        metavar="SPEC",
    )
    method: str = flag(
        help="The loss: compress-1q, compress-2q, seed, ... (compress methods lists them) or python:module:Class.",
        metavar="SPEC",
    )
    out: Path = flag(
        help="The folder of the run; for several students, the folder that holds their runs.", metavar="RUN"
    )
    data: str | None = flag(
        None, "The images, if they have moved since the export. Default: where the store says they are.", metavar="SPEC"
    )

    epochs: float | None = flag(None, "Passes over the images. Default: as published for the method.", panel="Recipe")
    steps: int | None = flag(
        None, "Optimizer steps of the whole run, instead of --epochs. Default: as many as --epochs makes.",
        panel="Recipe",
    )  # fmt: skip
    batch_size: int | None = flag(
        None, "Images per step on each device. Default: as published, for all devices together.", panel="Recipe",
        short="-b",
    )  # fmt: skip
    optimizer: OptimizerName | None = flag(
        None, "The optimizer of students and method. Default: as published.", panel="Recipe"
    )
    lr: float | None = flag(
        None, "The learning rate, used as it is. Default: as published, scaled with the batch size.", panel="Recipe"
    )
    momentum: float | None = flag(
        None, "Momentum of sgd and lars; beta 1 of adam and adamw. Default: as published.", panel="Recipe"
    )
    weight_decay: float | None = flag(None, "Weight decay. Default: as published.", panel="Recipe")
    norm_decay: bool | None = flag(
        None, "Apply weight decay to norms and biases too. Default: as published.", panel="Recipe"
    )
    schedule: ScheduleKind | None = flag(
        None, "How the learning rate falls during the run. Default: as published.", panel="Recipe"
    )
    warmup_epochs: float | None = flag(
        None, "Epochs in which the learning rate rises linearly from 0. Default: as published.", panel="Recipe"
    )
    clip: float | None = flag(
        None, "Clip the gradient of a student to this L2 norm. Default: as published; most methods do not clip.",
        panel="Recipe",
    )  # fmt: skip
    ema: float | None = flag(
        None, "Export a moving average of the student's weights, with this decay per step. Default: the last weights.",
        panel="Recipe",
    )  # fmt: skip
    seed: int = flag(0, "Seed of the order of images, the initial weights and the steps' randomness.", panel="Recipe")

    pairing: Pairing = flag(
        "same",
        "The student sees the same view as the teacher, a fresh view that no store holds, or another stored view "
        "(cross).",
        panel="Views",
    )
    views: int | None = flag(
        None,
        "Train on the stored views below this number; on view 0 only if it is the only one. Default: all.",
        panel="Views",
    )
    views_per_step: int | None = flag(
        None, "Views per image and step. Default: as many as the method needs.", panel="Views"
    )
    image_size: int | None = flag(
        None, "Side of the student's input images in pixels. Default: the student's own.", panel="Views",
        metavar="PIXELS",
    )  # fmt: skip
    allow_other_pixels: bool = flag(
        False, "Train even if this machine renders views differently from the one that made the store.", panel="Views"
    )

    device: str = flag("auto", "Device to train on: auto, cpu, cuda or cuda:1.", panel="Speed", metavar="DEVICE")
    devices: int | None = flag(
        None, "Train on this many devices of this machine. Do not give it under torchrun. Default: one device.",
        panel="Speed",
    )  # fmt: skip
    precision: Precision = flag(
        "fp32", "Arithmetic of the student; similarities are always computed in fp32.", panel="Speed"
    )
    compile: bool = flag(False, "Compile the student with torch.compile.", panel="Speed")
    channels_last: bool = flag(True, "Use the channels-last memory format for images and student.", panel="Speed")
    sync_bn: bool = flag(
        False, "Compute the statistics of batch norm over the batches of all CUDA devices.", panel="Speed"
    )
    workers: int | None = flag(
        None, "Loader processes. Default: one per core, at most 16; at most 4 if the model runs on the CPU.",
        panel="Speed", short="-j",
    )  # fmt: skip
    cache_images: Path | None = flag(
        None, "Keep decoded images in this folder: each is decoded once, not once per epoch. Default: no folder.",
        panel="Speed", metavar="FOLDER",
    )  # fmt: skip
    cache: Path | None = flag(
        None, "The folder for the local copy of a store in a bucket. Default: compress in the XDG cache.",
        panel="Speed", metavar="FOLDER",
    )  # fmt: skip

    val: str | None = flag(
        None, "Labelled images that score nearest neighbours while training. Default: no validation.", panel="Output",
        metavar="SPEC",
    )  # fmt: skip
    val_every: float = flag(1.0, "Epochs between validations.", panel="Output")
    save_every: int = flag(500, "Steps between checkpoints.", panel="Output")
    overwrite: bool = flag(False, "Start anew. An earlier run is moved aside, not deleted.", panel="Output")


class CannotSharePass(UserError):
    """These configs cannot share a pass over the images; run them separately. Nothing was trained."""


def run(config: Config) -> dict[str, Any]:
    """Train to the end, continuing from the last checkpoint if there is one.

    Returns {"summary", "runs": [folder, ...], "steps"}, and {} on ranks other than 0. With --devices, it starts
    this command again as ranks and returns what the launcher returns. The loop itself is `Trainer.train`.
    """
    if config.devices and not launch_env.is_launched():
        check(config)
        return launch.launch_ranks(config.devices, ["distill", *to_flags(replace(config, devices=None))])
    return train_together([config])


def train_together(configs: Sequence[Config]) -> dict[str, Any]:
    """Train all configs in one pass over the images. Returns what `run` returns.

    Their `data_pass_key`s must be equal. Raises CannotSharePass if the configs cannot share a pass for another
    reason, found before anything is trained.
    """
    if not launch_env.is_launched():
        return _train_in_this_process(configs)
    from compress_ssl.pipeline.distributed import collectives

    with collectives.process_group():
        return _train_in_this_process(configs)


def _train_in_this_process(configs: Sequence[Config]) -> dict[str, Any]:
    """`train_together` in one process, which is alone or one of several ranks."""
    # ---------------------------------------------------------------- checks before torch is imported
    for each in configs:
        check(each)
    config = configs[0]  # what concerns the images is equal in all configs
    storage = open_storage(config.store)
    artifact.read(storage, "store")

    from compress_ssl.pipeline.datasets import image_cache
    from compress_ssl.pipeline.distributed import collectives
    from compress_ssl.pipeline.store.feature_store import FeatureStore
    from compress_ssl.pipeline.store.local_cache import fetch
    from compress_ssl.pipeline.store.source_images import open_store_images
    from compress_ssl.pipeline.training.validation import open_labelled

    # ---------------------------------------------------------------- reading
    store = FeatureStore(storage)
    # Pixels that this machine renders differently are an error, or a warning with --allow-other-pixels.
    dataset = open_store_images(store, config.data, allow_other_pixels=config.allow_other_pixels)
    val = open_labelled(config.val) if config.val is not None else None
    if is_url(config.store):  # training reads each view many times: it needs a local copy
        with collectives.rank_zero_first():
            store = fetch(store, [*views_used(config, store), *store.other_views], config.cache)
    sampler = build_sampler(config, store)
    for each in configs:  # runs begun before and after the store grew have different views
        if views_used(each, store) != sampler.views:
            raise CannotSharePass(f"{each.out} was begun with other views than {config.out}")

    # ---------------------------------------------------------------- training
    try:
        if config.cache_images:
            dataset = image_cache.open_cache(dataset, config.cache_images)
        training_run = prepare(configs, store, dataset, sampler)
    except UserError as problem:
        raise CannotSharePass(str(problem)) if len(configs) > 1 else problem from None
    if training_run.start < sampler.steps:
        train(config, training_run, val)
    exported = export_students(training_run)
    if not exported:  # on ranks other than 0
        return {}
    return {"summary": "\n".join(exported.values()), "runs": [str(f) for f in exported], "steps": sampler.steps}


def data_pass_key(config: Config) -> tuple[Any, ...]:
    """A key that is equal for configs which need the same images, views and steps.

    Such configs differ only in their students and in how these are trained, so that one pass can serve all of them.
    """
    recipe = recipe_of(config)
    may_differ = {f.name for f in fields(recipe)} | PER_STUDENT
    shared = [getattr(config, f.name) for f in fields(config) if f.name not in may_differ]
    return (*shared, recipe.batch_size, config.steps or recipe.epochs, views_per_step(config), reads_features(config))


def check(config: Config) -> None:
    """Raises UserError for a config that can be refused before torch is imported, which takes seconds."""
    counts = ("steps", "batch_size", "views", "views_per_step", "image_size", "save_every", "devices")
    require(config, {name: POSITIVE for name in counts})
    finite = (lambda x: 0 < x < float("inf"), "must be more than 0 and finite")
    require(config, {name: finite for name in ("epochs", "val_every", "lr", "clip")})
    require(config, {"workers": NOT_NEGATIVE, "weight_decay": NOT_NEGATIVE, "warmup_epochs": NOT_NEGATIVE})
    require(
        config,
        {
            "seed": (lambda x: 0 <= x < 2**64, "must be from 0 to 2**64 - 1"),
            "momentum": (lambda x: 0 <= x < 1, "must be at least 0 and less than 1"),
            "ema": (lambda x: 0 < x < 1, "must be between 0 and 1"),
        },
    )
    if config.devices and launch_env.is_launched():
        raise UserError(
            "--devices starts ranks, but this process is already one of several, as by torchrun; leave --devices out"
        )
    if config.epochs and config.steps:
        raise UserError("--epochs and --steps were both given; keep one")
    for student in config.student:
        MODELS.parse(student)
    METHODS.parse(config.method)
    if not config.student:
        raise UserError("no --student was given; name at least one, for example --student cifar-resnet:20")
    require_run_folders(config.out, config.student, run_folders(config), config.overwrite)


def run_folders(config: Config) -> list[Path]:
    """The folder of each student's run, in the order of --student."""
    return list_run_folders(config.out, config.student, lambda: find_method(config.method).needs.peers)


def recipe_of(config: Config) -> "Recipe":
    """The method's published recipe, overridden by the flags that were given."""
    recipe = find_method(config.method).recipe
    given = {f.name: getattr(config, f.name) for f in fields(recipe) if f.name != "drops"}  # drops have no flag
    return replace(recipe, **{name: value for name, value in given.items() if value is not None})


def build_sampler(config: Config, store: "FeatureStore") -> "StepSampler":
    """The sampler of this rank: images and views of every step, and the number of steps.

    --batch-size is per rank; a published batch size is that of all ranks together.
    """
    from compress_ssl.pipeline.distributed import collectives
    from compress_ssl.pipeline.training.sampler import make_sampler

    recipe = recipe_of(config)
    batch = recipe.batch_size * (collectives.world_size() if config.batch_size else 1)
    sampler = make_sampler(
        store, views_used(config, store), seed=config.seed, batch=batch, views_per_step=views_per_step(config),
        pairing=config.pairing, epochs=recipe.epochs, steps=config.steps, reads_features=reads_features(config),
    )  # fmt: skip
    if sampler.batch < batch:
        echo(f"batch of {sampler.batch} instead of {batch}: that is all the usable images")
    return sampler


def views_per_step(config: Config) -> int:
    """Views per image and step, which independent peers divide. Raises UserError for fewer than the method needs."""
    needs = find_method(config.method).needs
    per_student = config.views_per_step or needs.views
    if per_student < needs.views:
        raise UserError(f"{config.method} needs --views-per-step {needs.views} or more, not {per_student}")
    return per_student * (len(config.student) if needs.independent else 1)


def reads_features(config: Config) -> bool:
    """Whether the method reads teacher features at all (mutual learning among students does not)."""
    return bool(find_method(config.method).needs.arrays)


def views_used(config: Config, store: "FeatureStore") -> tuple[int, ...]:
    """Stored views to train on, from `select_views`, which raises UserError for more views than the store has.

    A run continues with the views with which it began, even if the store has more views by now.
    """
    from compress_ssl.pipeline.training.sampler import select_views

    total = config.views or (None if config.overwrite else count_begun_views(run_folders(config)[0]))
    return select_views(store, total, config.store)


def prepare(
    configs: Sequence[Config], store: "FeatureStore", dataset: "Dataset", sampler: "StepSampler"
) -> "TrainingRun":
    """Build the learners of all configs, claim their run folders and restore their newest checkpoints."""
    from compress_ssl.pipeline.distributed import collectives
    from compress_ssl.pipeline.training.run import TrainingRun

    device = collectives.rank_device(configs[0].device)
    learners = [learner for config in configs for learner in learners_of(config, store, sampler, device)]
    sampler = sampler.with_needs(store, [learner.method.needs for learner in learners])
    training_run = TrainingRun(store, dataset, sampler, learners, device)
    training_run.batches.require_sizes()
    if collectives.rank() == 0:
        # Only now are earlier runs moved aside: a command that is refused must leave them in their place.
        for folder in [folder for config in configs if config.overwrite for folder in run_folders(config)]:
            set_aside(folder, "run")
    training_run.claim()
    training_run.restore()
    return training_run


def learners_of(
    config: Config, store: "FeatureStore", sampler: "StepSampler", device: "torch.device"
) -> list["Learner"]:
    """The learners of one config: one per student, or one for all of them if they are peers."""
    from compress_ssl.pipeline.training.build_learners import LearnerSpec, StudentOptions, build_learners
    from compress_ssl.pipeline.training.settings import TrainingSettings

    recipe, peers = recipe_of(config), find_method(config.method).needs.peers
    settings = TrainingSettings.from_recipe(
        recipe, sampler, lr=config.lr, ema=config.ema, precision=config.precision, seed=config.seed
    )
    spec = LearnerSpec(config.method, config.student, run_folders(config), peers, config.pairing, recipe.warmup_epochs)
    options = StudentOptions(config.image_size, config.channels_last, config.compile, config.sync_bn)
    return build_learners(spec, options, settings, store, sampler, device)


def train(config: Config, training_run: "TrainingRun", val: "Dataset | None") -> None:
    """Take the remaining steps of a run. This starts the training loop, `Trainer.train`."""
    from compress_ssl.pipeline.runtime.device import loader_workers
    from compress_ssl.pipeline.training.trainer import Trainer

    workers = loader_workers(config.workers, training_run.device, launch_env.local_world_size())
    Trainer(training_run, val, config.val_every, config.save_every, workers).train()
