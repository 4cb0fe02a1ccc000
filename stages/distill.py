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
from typing import TYPE_CHECKING

from compress_ssl.pipeline.distributed import launch
from compress_ssl.pipeline.runtime import artifact, launch_env
from compress_ssl.pipeline.runtime.config import CommandResult, to_flags
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.lease import set_aside
from compress_ssl.pipeline.runtime.storage import Folder, is_url, open_storage
from compress_ssl.pipeline.training.export_students import export_students
from compress_ssl.pipeline.training.run_folders import list_run_folders
from compress_ssl.stages.distill_config import Config, check

if TYPE_CHECKING:
    from compress_ssl.pipeline.datasets.base import Dataset
    from compress_ssl.pipeline.store.feature_store import FeatureStore
    from compress_ssl.pipeline.training.learner_spec import LearnerSpec
    from compress_ssl.pipeline.training.run import TrainingRun
    from compress_ssl.pipeline.training.sampler import Sampling, StepSampler

__all__ = ["CannotSharePass", "Config", "Job", "check", "prepare", "resolve", "run", "train", "train_together"]


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
    def data_pass_key(self) -> tuple[object, ...]:
        """A key that is equal for jobs which need the same images, views and steps.

        Such jobs differ only in their students and in how these are trained, so that one pass can serve all of them.
        """
        from compress_ssl.pipeline.training.resolve import Asked

        # These are found in `learners`, which may differ, or in `bounded_sampling`.
        resolved = {"out", "method", *(f.name for f in fields(Asked))}
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
