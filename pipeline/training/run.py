"""A training run: the learners of one pass over the images, and the step that they take together."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

import torch

from compress_ssl.pipeline.datasets.base import Dataset
from compress_ssl.pipeline.distributed import collectives
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.formatting import pluralize
from compress_ssl.pipeline.runtime.import_object import describe_with_location, passes_users_code
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.training.batches import BatchSource
from compress_ssl.pipeline.training.claim_runs import claim_run_folders, record_changes, require_length
from compress_ssl.pipeline.training.learner import Diverged, Learner
from compress_ssl.pipeline.training.learner_spec import LearnerSpec
from compress_ssl.pipeline.training.metrics_log import MetricsRow
from compress_ssl.pipeline.training.prepared_images import PreparedImages
from compress_ssl.pipeline.training.sampler import StepSampler
from compress_ssl.pipeline.training.student import Student
from compress_ssl.pipeline.views.loader import ViewBatch

Rows = list[MetricsRow | None]
"""Metrics of one step, one row per student; None for a student that did not train in this step."""


class TrainingRun:
    """Learners that see the same images in the same order, so that each image is decoded once for all of them."""

    def __init__(
        self,
        store: FeatureStore,
        dataset: Dataset,
        sampler: StepSampler,
        learners: Sequence[Learner],
        specs: Sequence[LearnerSpec],
        device: torch.device,
    ):
        """specs: from which the learners were built, in their order."""
        self.specs = [spec.with_resolved(learner.resolved) for spec, learner in zip(specs, learners, strict=True)]
        self.store, self.sampler, self.learners, self.device = store, sampler, list(learners), device
        self.batches = BatchSource(store, dataset, sampler, self.learners, device)

    @property
    def students(self) -> list[Student]:
        """All students, learner by learner."""
        return self.batches.students

    @property
    def start(self) -> int:
        """The first step that a learner still has to take."""
        return min(learner.start for learner in self.learners)

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which every usable image is seen once; a fraction where the batch does not divide the images."""
        return len(self.sampler.rows) / self.sampler.batch

    def summary(self) -> str:
        """One line on what is about to be trained, printed before the first step."""
        sampler = self.sampler
        methods = ", ".join(dict.fromkeys(spec.method.words for spec in self.specs))
        settings = [learner.settings for learner in self.learners]
        rates = ", ".join(dict.fromkeys(f"{each.optimizer} at {each.lr:g}" for each in settings))
        shared = f" ({sampler.batch // sampler.size} on each of {sampler.size} ranks)" if sampler.size > 1 else ""
        return (
            f"{pluralize(len(self.students), 'student')}, {methods}: steps {self.start} to {sampler.steps} "
            f"({sampler.steps / self.steps_per_epoch:g} epochs), global batch {sampler.batch} images x "
            f"{sampler.views_per_step} views{shared}, {rates}, on {self.device}"
        )

    def claim(self) -> None:
        """Rank 0 writes each run's manifest, or compares it with the one that is there. Raises Mismatch."""
        if collectives.rank() == 0:
            for learner, spec in zip(self.learners, self.specs, strict=True):
                claim_run_folders(learner, spec, self.store, self.sampler)

    def restore(self) -> None:
        """Load each learner's newest checkpoint. Memory banks hold (i, v) only: their features come from the store.

        Raises UserError for fewer steps than an unfinished run was begun for.
        """
        for learner, spec in zip(self.learners, self.specs, strict=True):
            learner.restore()
            learner.method.refill_banks(self.batches.read_features)
            require_length(learner, spec, self.sampler)

    def record_changes(self) -> None:
        """Rank 0 records what may change while a run lasts, such as a larger number of steps."""
        if collectives.rank() == 0:
            for learner, spec in zip(self.learners, self.specs, strict=True):
                record_changes(learner, spec, self.sampler)

    def load_views(self, workers: int) -> Generator[ViewBatch, None, None]:
        """The pixels of steps start, start + 1, ... workers: loader processes; 0 loads in this process."""
        return self.batches.load_views(workers, self.start)

    def step(self, step: int, view_batch: ViewBatch, measure: bool) -> Rows:
        """Take one step with each learner and return a row of metrics per student.

        view_batch: the pixels of this step. measure: add the diagnostics, which are too slow for every step.

        A learner that was restored at a later step waits, and its students' rows are None. A learner that diverges
        stops; the others continue. Raises UserError for an image that the teacher did not see, and Diverged if no
        learner is left. Each learner computes its loss in `Learner.step`.
        """
        batch = self.batches.build_batch(step)
        self.batches.require_unchanged(batch, view_batch)
        collectives.barrier()  # a rank whose checks failed must not leave the others waiting inside the step
        epoch = round((step + 1) / self.steps_per_epoch, 4)
        prepared = PreparedImages(self.device)
        rows: Rows = []
        for learner in self.learners:
            metrics: Sequence[dict[str, float] | None] = [None] * len(learner.students)
            if step >= learner.start and not learner.failure:
                for group, images in self.batches.prepare_inputs(learner, view_batch, prepared):
                    batch.set_images(group, images)
                with self.isolating_divergence(learner):
                    metrics = learner.step(batch, step / self.sampler.steps, measure)
            rows += [MetricsRow(step + 1, {"epoch": epoch, **row}) if row else None for row in metrics]
        return rows

    @contextmanager
    def isolating_divergence(self, learner: Learner) -> Iterator[None]:
        """Stop the learner if it diverges inside the `with`. Raises Diverged only if no other learner is left.

        An error in a user's own method or network becomes a UserError with its file and line.
        """
        try:
            yield
        except Diverged as error:
            learner.failure = str(error)
            if all(other.failure for other in self.learners):
                raise
        except UserError:
            raise
        except Exception as wrong:
            if not passes_users_code(wrong):
                raise
            name = type(learner.method).__name__
            raise UserError(f"{name} or its student failed: {describe_with_location(wrong)}") from wrong
