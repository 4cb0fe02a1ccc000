"""A training run: what each step looks at, and the lessons that learn from it."""

from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress_ssl.pipeline.datasets.decode import GOOD
from compress_ssl.pipeline.distributed import collectives
from compress_ssl.pipeline.methods.base import Batch
from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.formatting import pluralize
from compress_ssl.pipeline.runtime.storage import Folder, absolute
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.training.learner import Diverged, Learner
from compress_ssl.pipeline.training.sampler import StepSampler
from compress_ssl.pipeline.training.student import Student
from compress_ssl.pipeline.training.teacher_features import TeacherFeatures
from compress_ssl.pipeline.views.augment import ViewSpec
from compress_ssl.pipeline.views.loader import ViewBatch, ViewDataset, iterate_views
from compress_ssl.pipeline.views.numbering import view_name
from compress_ssl.pipeline.views.render import default_local_size

Rows = list[dict[str, Any] | None]  # of metrics, per apprentice; None for one who does not learn in this step


@dataclass
class TrainingRun:
    """Pixels and teacher features of every step of a plan, for all lessons alike."""

    store: FeatureStore
    dataset: Any
    plan: StepSampler
    learners: list[Learner]
    device: torch.device
    spec: ViewSpec = field(init=False)
    features: dict[str, TeacherFeatures] = field(init=False)  # by array of the store
    content: np.ndarray = field(init=False)  # (N,) uint64: the images the teacher saw

    def __post_init__(self) -> None:
        self.spec = ViewSpec(**self.store.identity["views"])
        wanted = dict.fromkeys(name for learner in self.learners for name in learner.method.needs.arrays)
        least = {True: len(self.plan.local), False: 2 * self.plan.views_per_step}
        self.features = {
            name: TeacherFeatures(self.store, name, least=least[name.startswith("local_")]) for name in wanted
        }
        self.content = self.store.table("content")

    @property
    def students(self) -> list[Student]:
        """All students, lesson by lesson."""
        return [student for learner in self.learners for student in learner.students]

    @property
    def start(self) -> int:
        """Steps that all lessons have behind them."""
        return min(learner.start for learner in self.learners)

    @property
    def per_epoch(self) -> float:
        """Steps in an epoch."""
        return len(self.plan.rows) / self.plan.batch

    def summary(self) -> str:
        """What is about to be trained, in a line."""
        plan = self.plan
        methods = ", ".join(dict.fromkeys(learner.name for learner in self.learners))
        rates = ", ".join(dict.fromkeys(f"{x.training.optimizer} at {x.training.lr:g}" for x in self.learners))
        shared = f" ({plan.batch // plan.size} on each of {plan.size} ranks)" if plan.size > 1 else ""
        return (
            f"{pluralize(len(self.students), 'student')}, {methods}: steps {self.start} to {plan.steps} "
            f"({plan.steps / self.per_epoch:g} epochs), global batch {plan.batch} images x {plan.views_per_step} views"
            f"{shared}, {rates}, on {self.device}"
        )

    def claim(self) -> None:
        """Write each run's manifest, what it is and came from, or compare it with the one that is there.

        The end of the run is not part of what it is: it may grow. Nor is the number of ranks, of which
        the first does this. Raises Mismatch.
        """
        for learner in self.learners if collectives.rank() == 0 else []:
            how = asdict(learner.training)
            how["schedule"] |= {"warmup": None, "warmup_epochs": learner.warmup_epochs}
            everybody = [_who(student) for student in learner.students]
            for student, who in zip(learner.students, everybody, strict=True):
                identity = {
                    "store": self.store.fingerprint,
                    "images": len(self.plan.rows),
                    "student": who,
                    "method": learner.name,
                    "training": how,
                    "batch_size": self.plan.batch,
                    "pairing": self.plan.pairing,
                    "views_per_step": self.plan.views_per_step,
                    "views": list(self.plan.views),
                }
                if len(learner.students) > 1:
                    identity["peers"] = everybody
                artifact.claim(Folder(student.folder), "run", identity, self._about(student))

    def _about(self, student: Student) -> dict[str, Any]:
        return {
            "store": absolute(str(self.store.storage)),
            "data": self.store.about["data"],
            "views": self.plan.views[-1] + 1,
            "views_spec": self.store.identity["views"],
            "parameters": sum(p.numel() for p in student.model.backbone.parameters()),
            "teacher": self.store.about["teacher"],
            "name": student.model.name,
        }

    def restore(self) -> None:
        """Every lesson goes back to its newest checkpoint; the banks' anchors are read from the store."""
        for learner in self.learners:
            learner.restore()
            learner.method.refill_banks(self.read)

    def read(self, rows: Tensor, views: Tensor, name: str = "embedding") -> Tensor:
        """(n, ...) float32 teacher features of (rows[j], views[j]). Raises UserError for those that are not finite."""
        features = self.features.get(name) or TeacherFeatures(self.store, name)
        i, v = rows.cpu().numpy(), views.cpu().numpy()
        picked = features.rows(i, v)
        self._require_finite(name, picked, i, v)
        return torch.from_numpy(picked)

    def load_views(self, workers: int) -> Generator[ViewBatch, None, None]:
        """The pixels of steps start, start + 1, ..."""
        requests: Any = replace(self.plan, first=self.start)
        sizes, local = self._sizes(_size), self._sizes(self._local_size) if self.plan.has_local else []
        view_dataset = ViewDataset(self.dataset, self.spec, self.store.table("view_key"), sizes, requests, local)
        return iterate_views(view_dataset, workers, pin=self.device.type == "cuda")

    def step(self, step: int, view_batch: ViewBatch, measure: bool) -> Rows:
        """One step of each lesson -> a row of metrics for each of its students.

        None for those who have this step behind them or whose lesson is over. `measure` adds what
        is not worth its time in every step. A lesson that diverges is over; the others go on.
        Raises UserError for an image that the teacher did not see, Diverged if no lesson is left.
        """
        batch = self.batch(step)
        self._require_unchanged(batch, view_batch)
        collectives.barrier()  # nobody begins a step that another cannot take
        epoch, rows, prepared = round((step + 1) / self.per_epoch, 4), [], _Prepared(self.device)
        for learner in self.learners:
            made: Sequence[dict[str, float] | None] = [None] * len(learner.students)
            if step >= learner.start and not learner.failure:
                batch.images, batch.local_images = self._inputs(learner, view_batch, prepared)
                with self.isolating_divergence(learner):
                    made = learner.step(batch, step / self.plan.steps, measure)
            rows += [row and {"step": step + 1, "epoch": epoch, **row} for row in made]
        return rows

    @contextmanager
    def isolating_divergence(self, learner: Learner) -> Iterator[None]:
        """A lesson that diverges here ends without the others. Raises Diverged if it was the last."""
        try:
            yield
        except Diverged as end:
            learner.failure = str(end)
            if all(other.failure for other in self.learners):
                raise

    def _inputs(
        self, learner: Learner, view_batch: ViewBatch, prepared: "_Prepared"
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(images, local images) of each student of a lesson, prepared on the device."""
        count, independent = len(learner.students), learner.method.needs.independent
        images, local = [], []
        for number, student in enumerate(learner.students):
            pixels = view_batch.pixels[self._sizes(_size).index(_size(student))]  # (B, W, 3, S, S)
            if independent:
                pixels = pixels.chunk(count, 1)[number]
            images.append(prepared(student, pixels, (number, independent and count)))
            if _local(learner):
                small = view_batch.local[self._sizes(self._local_size).index(self._local_size(student))]
                local.append(prepared(student, small, (number, "local")))
        return images, local

    def batch(self, step: int) -> Batch:
        """The step's (i, v) and the teacher's side of it. Raises UserError for features that are not finite."""
        rows, student_views, teacher_views = self.plan.at(step)
        local_views, teacher = self.plan.local_at(step), {}
        for name, features in self.features.items():
            views = local_views if name.startswith("local_") else teacher_views
            assert views is not None
            picked = features.rows(rows.repeat(views.shape[1]), views.flatten())
            self._require_finite(name, picked, rows.repeat(views.shape[1]), views.flatten())
            teacher[name] = torch.from_numpy(picked).unflatten(0, views.shape).to(self.device)
        i, v, u = (torch.from_numpy(part).to(self.device) for part in (rows, student_views, teacher_views))
        local = None if local_views is None else torch.from_numpy(local_views).to(self.device)
        return Batch(step, i, v, u, teacher, [], local_views=local)

    def _require_finite(self, name: str, picked: np.ndarray, rows: np.ndarray, views: np.ndarray) -> None:
        sums = picked.sum(tuple(range(1, picked.ndim)))  # NaN and infinity survive a sum
        if not np.isfinite(sums).all():
            j = int(np.flatnonzero(~np.isfinite(sums))[0])
            raise UserError(
                f"{self.store.storage}: {name} of image {self.dataset.ids[int(rows[j])]} in {view_name(int(views[j]))} "
                "is not finite; find the damage with compress verify"
            )

    def _require_unchanged(self, batch: Batch, view_batch: ViewBatch) -> None:
        rows = batch.rows.cpu().numpy()
        changed = np.flatnonzero((view_batch.content != self.content[rows]) | (view_batch.status != GOOD))
        if len(changed):
            i = int(rows[changed[0]])
            why = view_batch.bad.get(i, "its content differs from what the teacher saw")
            remedy = self.dataset.remedy
            raise UserError(
                f"image {self.dataset.ids[i]} changed since the export: {why}; {remedy}, or export into a new store"
            )

    def _sizes(self, size: Callable[[Student], tuple[int, str]]) -> list[tuple[int, str]]:
        return list(dict.fromkeys(size(student) for student in self.students))

    def require_sizes(self) -> None:
        """Raises UserError if a student cannot take the local crops that its method shows it."""
        for learner in self.learners:
            if _local(learner):
                for student in learner.students:
                    student.model.require_size(self._local_size(student)[0], "--image-size")

    def _local_size(self, student: Student) -> tuple[int, str]:
        """Local crops are as much smaller than the student's images as they were for the teacher."""
        wants = student.model.preprocessing
        if (local := self.store.identity.get("local")) is None:
            return default_local_size(wants.size), wants.interpolation
        whole = self.store.identity["teacher"]["preprocessing"]["size"]
        return max(8, 8 * round(wants.size * local["size"] / whole / 8)), wants.interpolation


class _Prepared:
    """What students of a step see, on the device: once for those of different lessons who see the same."""

    def __init__(self, device: torch.device):
        self.device = device
        self.made: dict[Hashable, tuple[Tensor, int]] = {}

    def __call__(self, student: Student, pixels: Tensor, which: Hashable) -> Tensor:
        """(B, W, 3, S, S) uint8 -> (B * W, 3, S, S). which: of the lesson's peers, and of the step's pixels."""
        model = student.model
        key = (which, model.preprocessing)
        images, version = self.made.get(key, (None, 0))
        if images is None or images._version != version:  # a student that writes into its input spoils it for itself
            images = model.prepare(pixels.flatten(0, 1).to(self.device, non_blocking=True))
            self.made[key] = images, images._version
        return images


def _local(learner: Learner) -> bool:
    """Whether its students see local crops."""
    return any(name.startswith("local_") for name in learner.method.needs.outputs)


def _who(student: Student) -> dict[str, Any]:
    """What a student is, for a run's identity."""
    model = student.model
    looks = model.preprocessing.record()
    return {"spec": model.spec, "preprocessing": looks, "width": model.width, "initial": model.digest()}


def _size(student: Student) -> tuple[int, str]:
    wants = student.model.preprocessing
    return wants.size, wants.interpolation
