"""`compress distill`: train students from a feature store and its images, and export their weights.

From the command to the place where a loss is computed:

    run -> train -> Trainer.train           the loop: pixels, one step, logs, checkpoints (training/trainer.py)
        -> TrainingRun.step                 one step of all learners of the run          (training/run.py)
        -> Learner.step                     one step of one method with its students     (training/learner.py)
        -> DistillationModule.forward       students and method as one module (training/distillation_module.py)
        -> Method.forward                   the loss of a batch                          (methods/)

One pass over the images may serve several commands (a sweep): each image is decoded once for all their students.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress_ssl.pipeline.distributed import launch
from compress_ssl.pipeline.methods import METHODS, find_method
from compress_ssl.pipeline.models import MODELS
from compress_ssl.pipeline.runtime import artifact, launch_env
from compress_ssl.pipeline.runtime.choices import Precision
from compress_ssl.pipeline.runtime.config import NOT_NEGATIVE, POSITIVE, CommandResult, flag, require, to_flags
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.lease import set_aside
from compress_ssl.pipeline.runtime.storage import Folder, is_url, open_storage
from compress_ssl.pipeline.training.choices import OptimizerName, Pairing
from compress_ssl.pipeline.training.export_students import export_students
from compress_ssl.pipeline.training.run_folders import list_run_folders, require_run_folders
from compress_ssl.pipeline.training.schedule import ScheduleKind

if TYPE_CHECKING:
    from compress_ssl.pipeline.datasets.base import Dataset
    from compress_ssl.pipeline.store.feature_store import FeatureStore
    from compress_ssl.pipeline.training.learner_spec import LearnerSpec
    from compress_ssl.pipeline.training.run import TrainingRun
    from compress_ssl.pipeline.training.sampler import Sampling, StepSampler


@dataclass(frozen=True)
class Config:
    """Train students to reproduce the teacher's similarities between images, read from a feature store.

    Optimizer, learning rate, batch size and epochs default to the method's published recipe. Running the same
    command again continues an interrupted run; a larger --epochs makes a finished run longer. A flag that is left out
    then keeps the value with which the run was begun.
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
    seed: int | None = flag(
        None, "Seed of the order of images, the initial weights and the steps' randomness. Default: 0.", panel="Recipe"
    )

    pairing: Pairing | None = flag(
        None,
        "The student sees the same view as the teacher, a fresh view that no store holds, or another stored view "
        "(cross). Default: same.",
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
    precision: Precision | None = flag(
        None, "Arithmetic of the student; similarities are always computed in fp32. Default: fp32.", panel="Speed"
    )
    compile: bool | None = flag(None, "Compile the student with torch.compile. Default: it is not.", panel="Speed")
    channels_last: bool | None = flag(
        None, "Use the channels-last memory format for images and student. Default: yes.", panel="Speed"
    )
    sync_bn: bool | None = flag(
        None, "Compute the statistics of batch norm over the batches of all CUDA devices. Default: no.", panel="Speed"
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


@dataclass(frozen=True)
class Job:
    """A Config with its specs parsed and its defaults filled: what was given, else recorded, else today's default."""

    config: Config  # the flags that need no resolving: where things are, and what does not change the result
    learners: tuple["LearnerSpec", ...]
    sampling: "Sampling"  # as it was asked for: what concerns the images, equal for all learners
    bounded_sampling: "Sampling"  # the same with no more views and images per step than the store has

    @property
    def folders(self) -> list[Path]:
        """The folder of each student's run, in the order of --student."""
        return [student.folder for learner in self.learners for student in learner.students]

    @property
    def data_pass_key(self) -> tuple[Any, ...]:
        """A key that is equal for jobs which need the same images, views and steps.

        Such jobs differ only in their students and in how these are trained, so that one pass can serve all of them.
        """
        from compress_ssl.pipeline.training.resolve import Asked

        resolved = {
            "out",
            "method",
            *(f.name for f in fields(Asked)),
        }  # found in `learners`, which may differ, or in `sampling`
        shared = [getattr(self.config, f.name) for f in fields(self.config) if f.name not in resolved]
        return (*shared, self.bounded_sampling)


def run(config: Config) -> CommandResult:
    """Train to the end, continuing from the last checkpoint if there is one.

    Returns {"summary", "runs": [folder, ...], "steps"}, and {} on ranks other than 0. With --devices, it starts
    this command again as ranks and returns what the launcher returns. The loop itself is `Trainer.train`.
    """
    check(config)  # before torch is imported, which takes seconds
    if config.devices and not launch_env.is_launched():
        return launch.launch_ranks(config.devices, ["distill", *to_flags(replace(config, devices=None))])
    artifact.read(open_storage(config.store), "store")
    if not launch_env.is_launched():
        return train_together([resolve(config)])
    from compress_ssl.pipeline.distributed import collectives

    with collectives.process_group():
        return train_together([resolve(config)])


def train_together(jobs: Sequence[Job]) -> CommandResult:
    """Train all jobs in one pass over the images, in one process, which is alone or one of several ranks.

    Returns what `run` returns. The `data_pass_key`s of the jobs must be equal. Raises CannotSharePass if they cannot
    share a pass for another reason, found before anything is trained.
    """
    from compress_ssl.pipeline.datasets import image_cache
    from compress_ssl.pipeline.distributed import collectives
    from compress_ssl.pipeline.store.feature_store import FeatureStore
    from compress_ssl.pipeline.store.local_cache import fetch
    from compress_ssl.pipeline.store.source_images import open_store_images
    from compress_ssl.pipeline.training.sampler import make_sampler, select_views
    from compress_ssl.pipeline.training.validation import open_labelled

    config, asked = jobs[0].config, jobs[0].sampling  # what concerns the images is equal in all jobs
    for job in jobs:
        if job.bounded_sampling != jobs[0].bounded_sampling:
            raise CannotSharePass(f"{job.config.out} needs other images, views or steps than {config.out}")

    # ---------------------------------------------------------------- reading
    store = FeatureStore(open_storage(config.store))
    # Pixels that this machine renders differently are an error, or a warning with --allow-other-pixels.
    dataset = open_store_images(store, config.data, allow_other_pixels=config.allow_other_pixels)
    val = open_labelled(config.val) if config.val is not None else None
    if is_url(config.store):  # training reads each view many times: it needs a local copy
        with collectives.rank_zero_first():
            store = fetch(store, [*select_views(store, asked.views, config.store), *store.other_views], config.cache)
    sampler = make_sampler(store, asked, config.store)
    if config.cache_images:
        dataset = image_cache.open_cache(dataset, config.cache_images)

    # ---------------------------------------------------------------- training
    training_run = prepare(jobs, store, dataset, sampler)
    if training_run.start < sampler.steps:
        train(config, training_run, val)
    exported = export_students(training_run)
    if not exported:  # on ranks other than 0
        return {}
    steps = max(sampler.steps, training_run.start)  # a run that is finished already may be longer
    return {"summary": "\n".join(exported.values()), "runs": [str(f) for f in exported], "steps": steps}


def check(config: Config) -> None:
    """Raises UserError for a config that can be refused before torch is imported, which takes seconds."""
    positive = (
        "steps", "batch_size", "views", "views_per_step", "image_size", "save_every", "devices", "epochs", "val_every",
        "lr", "clip",
    )  # fmt: skip
    require(
        config,
        {
            **{name: POSITIVE for name in positive},
            **{name: NOT_NEGATIVE for name in ("workers", "weight_decay", "warmup_epochs")},
            "seed": (lambda x: 0 <= x < 2**64, "must be from 0 to 2**64 - 1"),
            "momentum": (lambda x: 0 <= x < 1, "must be at least 0 and less than 1"),
            "ema": (lambda x: 0 < x < 1, "must be between 0 and 1"),
        },
    )
    launched = launch_env.read_launch() is not None  # refuses what no launcher sets
    if config.devices and launched:
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
    folders = list_run_folders(config.out, config.student, lambda: find_method(config.method).needs.peers)
    require_run_folders(config.out, config.student, folders, config.overwrite)


# ---------------------------------------------------------------- from flags to a job


def resolve(config: Config) -> Job:
    """The job of a config. Each value is the one that was given, else that of the run that has begun in the folder,
    else the default. With --overwrite nothing that was recorded counts.

    Raises UserError for specs that cannot be resolved, and CannotSharePass for students whose runs were begun with
    other images, views or steps.
    """
    from compress_ssl.pipeline.methods.options import find_typed
    from compress_ssl.pipeline.store.records import read_store
    from compress_ssl.pipeline.training.resolve import Asked, Member, resolve_learners
    from compress_ssl.pipeline.training.run_record import read_begun_run

    method = find_typed(config.method)
    folders = list_run_folders(config.out, config.student, lambda: method.method.needs.peers)
    members = [
        Member(spec, folder, None if config.overwrite else read_begun_run(Folder(folder)))
        for spec, folder in zip(config.student, folders, strict=True)
    ]
    asked = Asked(**{f.name: getattr(config, f.name) for f in fields(Asked)})
    learners = resolve_learners(asked, method, members)
    for learner in learners:
        if learner.sampling != learners[0].sampling:
            one, other = learners[0].students[0].folder, learner.students[0].folder
            raise CannotSharePass(
                f"{other} was begun with other images, views or steps than {one}; continue them by separate commands, "
                "each with one --student"
            )
    sampling, store = learners[0].sampling, read_store(open_storage(config.store))
    batch, views = min(sampling.batch, store.identity.data.images), sampling.views or store.about.views
    return Job(config, learners, sampling, replace(sampling, batch=batch, views=views))


def prepare(jobs: Sequence[Job], store: "FeatureStore", dataset: "Dataset", sampler: "StepSampler") -> "TrainingRun":
    """Build the learners of all jobs, claim their run folders and restore their newest checkpoints.

    An error with several jobs is a CannotSharePass, and the jobs can be run separately, until earlier runs have been
    moved aside: from then on it is raised as it is, since --overwrite would move the new ones aside too.
    """
    from compress_ssl.pipeline.distributed import collectives
    from compress_ssl.pipeline.training.build_learners import build_learner
    from compress_ssl.pipeline.training.run import TrainingRun

    device = collectives.rank_device(jobs[0].config.device)
    specs = [spec for job in jobs for spec in job.learners]
    with _separable(len(jobs) > 1):
        learners = [build_learner(spec, store, sampler, device) for spec in specs]
        sampler = sampler.with_needs(store, [learner.method.needs for learner in learners])
        training_run = TrainingRun(store, dataset, sampler, learners, specs, device)
        training_run.batches.require_sizes()
    # Only now are earlier runs moved aside: a command that is refused must leave them in their place.
    replaced = [folder for job in jobs if job.config.overwrite for folder in job.folders]
    for folder in replaced if collectives.rank() == 0 else []:
        set_aside(folder, "run")
    with _separable(len(jobs) > 1 and not replaced):
        training_run.claim()
        training_run.restore()
    return training_run


@contextmanager
def _separable(several: bool) -> Iterator[None]:
    """Turn a UserError in the block into CannotSharePass if there are several jobs: alone, each tells if it is its."""
    try:
        yield
    except UserError as problem:
        raise CannotSharePass(str(problem)) if several else problem from None


def train(config: Config, training_run: "TrainingRun", val: "Dataset | None") -> None:
    """Take the remaining steps of a run. This starts the training loop, `Trainer.train`."""
    from compress_ssl.pipeline.runtime.device import loader_workers
    from compress_ssl.pipeline.training.trainer import Trainer

    workers = loader_workers(config.workers, training_run.device, launch_env.local_world_size())
    Trainer(training_run, val, config.val_every, config.save_every, workers).train()
