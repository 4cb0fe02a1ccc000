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
from compress_ssl.pipeline.runtime.formatting import counted
from compress_ssl.pipeline.runtime.storage import Folder, absolute
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.training.learner import Diverged, Lesson
from compress_ssl.pipeline.training.sampler import Plan
from compress_ssl.pipeline.training.student import Apprentice
from compress_ssl.pipeline.training.teacher_features import Features
from compress_ssl.pipeline.views.augment import ViewSpec
from compress_ssl.pipeline.views.loader import Eyes, Sight, feed
from compress_ssl.pipeline.views.numbering import view_name
from compress_ssl.pipeline.views.render import local_size

Rows = list[dict[str, Any] | None]  # of metrics, per apprentice; None for one who does not learn in this step


@dataclass
class Session:
    """Pixels and teacher features of every step of a plan, for all lessons alike."""

    store: FeatureStore
    dataset: Any
    plan: Plan
    lessons: list[Lesson]
    device: torch.device
    spec: ViewSpec = field(init=False)
    features: dict[str, Features] = field(init=False)  # by array of the store
    content: np.ndarray = field(init=False)  # (N,) uint64: the images the teacher saw

    def __post_init__(self) -> None:
        self.spec = ViewSpec(**self.store.identity["views"])
        wanted = dict.fromkeys(name for lesson in self.lessons for name in lesson.method.needs.arrays)
        least = {True: len(self.plan.local), False: 2 * self.plan.per_step}
        self.features = {name: Features(self.store, name, least=least[name.startswith("local_")]) for name in wanted}
        self.content = self.store.table("content")

    @property
    def apprentices(self) -> list[Apprentice]:
        """All students, lesson by lesson."""
        return [apprentice for lesson in self.lessons for apprentice in lesson.apprentices]

    @property
    def start(self) -> int:
        """Steps that all lessons have behind them."""
        return min(lesson.start for lesson in self.lessons)

    @property
    def per_epoch(self) -> float:
        """Steps in an epoch."""
        return len(self.plan.rows) / self.plan.batch

    def introduction(self) -> str:
        """What is about to be trained, in a line."""
        plan = self.plan
        methods = ", ".join(dict.fromkeys(lesson.name for lesson in self.lessons))
        rates = ", ".join(dict.fromkeys(f"{x.training.optimizer} at {x.training.lr:g}" for x in self.lessons))
        shared = f" ({plan.batch // plan.size} on each of {plan.size} ranks)" if plan.size > 1 else ""
        return (
            f"{counted(len(self.apprentices), 'student')}, {methods}: steps {self.start} to {plan.steps} "
            f"({plan.steps / self.per_epoch:g} epochs), global batch {plan.batch} images x {plan.per_step} views"
            f"{shared}, {rates}, on {self.device}"
        )

    def claim(self) -> None:
        """Write each run's manifest, what it is and came from, or compare it with the one that is there.

        The end of the run is not part of what it is: it may grow. Nor is the number of ranks, of which
        the first does this. Raises Mismatch.
        """
        for lesson in self.lessons if collectives.rank() == 0 else []:
            how = asdict(lesson.training)
            how["schedule"] |= {"warmup": None, "warmup_epochs": lesson.warmup_epochs}
            everybody = [_who(apprentice) for apprentice in lesson.apprentices]
            for apprentice, who in zip(lesson.apprentices, everybody, strict=True):
                identity = {
                    "store": self.store.fingerprint,
                    "images": len(self.plan.rows),
                    "student": who,
                    "method": lesson.name,
                    "training": how,
                    "batch_size": self.plan.batch,
                    "pairing": self.plan.pairing,
                    "views_per_step": self.plan.per_step,
                    "views": list(self.plan.views),
                }
                if len(lesson.apprentices) > 1:
                    identity["peers"] = everybody
                artifact.claim(Folder(apprentice.folder), "run", identity, self._about(apprentice))

    def _about(self, apprentice: Apprentice) -> dict[str, Any]:
        return {
            "store": absolute(str(self.store.storage)),
            "data": self.store.about["data"],
            "views": self.plan.views[-1] + 1,
            "views_spec": self.store.identity["views"],
            "parameters": sum(p.numel() for p in apprentice.student.backbone.parameters()),
            "teacher": self.store.about["teacher"],
            "name": apprentice.student.name,
        }

    def restore(self) -> None:
        """Every lesson goes back to its newest checkpoint; the banks' anchors are read from the store."""
        for lesson in self.lessons:
            lesson.restore()
            lesson.method.fill(self.read)

    def read(self, rows: Tensor, views: Tensor, name: str = "embedding") -> Tensor:
        """(n, ...) float32 teacher features of (rows[j], views[j]). Raises UserError for those that are not finite."""
        features = self.features.get(name) or Features(self.store, name)
        i, v = rows.cpu().numpy(), views.cpu().numpy()
        picked = features.rows(i, v)
        self._require_finite(name, picked, i, v)
        return torch.from_numpy(picked)

    def sights(self, workers: int) -> Generator[Sight, None, None]:
        """The pixels of steps start, start + 1, ..."""
        pieces: Any = replace(self.plan, first=self.start)
        sizes, local = self._sizes(_size), self._sizes(self._local_size) if self.plan.has_local else []
        eyes = Eyes(self.dataset, self.spec, self.store.table("view_key"), sizes, pieces, local)
        return feed(eyes, workers, pin=self.device.type == "cuda")

    def step(self, step: int, sight: Sight, measure: bool) -> Rows:
        """One step of each lesson -> a row of metrics for each of its students.

        None for those who have this step behind them or whose lesson is over. `measure` adds what
        is not worth its time in every step. A lesson that diverges is over; the others go on.
        Raises UserError for an image that the teacher did not see, Diverged if no lesson is left.
        """
        batch = self.batch(step)
        self._require_unchanged(batch, sight)
        collectives.largest()  # nobody begins a step that another cannot take
        epoch, rows, prepared = round((step + 1) / self.per_epoch, 4), [], _Prepared(self.device)
        for lesson in self.lessons:
            made: Sequence[dict[str, float] | None] = [None] * len(lesson.apprentices)
            if step >= lesson.start and not lesson.over:
                batch.images, batch.local_images = self._inputs(lesson, sight, prepared)
                with self.alone(lesson):
                    made = lesson.step(batch, step / self.plan.steps, measure)
            rows += [row and {"step": step + 1, "epoch": epoch, **row} for row in made]
        return rows

    @contextmanager
    def alone(self, lesson: Lesson) -> Iterator[None]:
        """A lesson that diverges here ends without the others. Raises Diverged if it was the last."""
        try:
            yield
        except Diverged as end:
            lesson.over = str(end)
            if all(other.over for other in self.lessons):
                raise

    def _inputs(self, lesson: Lesson, sight: Sight, prepared: "_Prepared") -> tuple[list[Tensor], list[Tensor]]:
        """(images, local images) of each student of a lesson, prepared on the device."""
        count, independent = len(lesson.apprentices), lesson.method.needs.independent
        images, local = [], []
        for number, apprentice in enumerate(lesson.apprentices):
            pixels = sight.pixels[self._sizes(_size).index(_size(apprentice))]  # (B, W, 3, S, S)
            if independent:
                pixels = pixels.chunk(count, 1)[number]
            images.append(prepared(apprentice, pixels, (number, independent and count)))
            if _local(lesson):
                small = sight.local[self._sizes(self._local_size).index(self._local_size(apprentice))]
                local.append(prepared(apprentice, small, (number, "local")))
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

    def _require_unchanged(self, batch: Batch, sight: Sight) -> None:
        rows = batch.rows.cpu().numpy()
        changed = np.flatnonzero((sight.content != self.content[rows]) | (sight.status != GOOD))
        if len(changed):
            i = int(rows[changed[0]])
            why = sight.bad.get(i, "its content differs from what the teacher saw")
            remedy = getattr(self.dataset, "remedy", "put it back")
            raise UserError(
                f"image {self.dataset.ids[i]} changed since the export: {why}; {remedy}, or export into a new store"
            )

    def _sizes(self, size: Callable[[Apprentice], tuple[int, str]]) -> list[tuple[int, str]]:
        return list(dict.fromkeys(size(apprentice) for apprentice in self.apprentices))

    def require_sizes(self) -> None:
        """Raises UserError if a student cannot take the local crops that its method shows it."""
        for lesson in self.lessons:
            if _local(lesson):
                for apprentice in lesson.apprentices:
                    apprentice.student.require_size(self._local_size(apprentice)[0], "--image-size")

    def _local_size(self, apprentice: Apprentice) -> tuple[int, str]:
        """Local crops are as much smaller than the student's images as they were for the teacher."""
        wants = apprentice.student.preprocessing
        if (local := self.store.identity.get("local")) is None:
            return local_size(wants.size), wants.interpolation
        whole = self.store.identity["teacher"]["preprocessing"]["size"]
        return max(8, 8 * round(wants.size * local["size"] / whole / 8)), wants.interpolation


class _Prepared:
    """What students of a step see, on the device: once for those of different lessons who see the same."""

    def __init__(self, device: torch.device):
        self.device = device
        self.made: dict[Hashable, tuple[Tensor, int]] = {}

    def __call__(self, apprentice: Apprentice, pixels: Tensor, which: Hashable) -> Tensor:
        """(B, W, 3, S, S) uint8 -> (B * W, 3, S, S). which: of the lesson's peers, and of the step's pixels."""
        student = apprentice.student
        key = (which, student.preprocessing)
        images, version = self.made.get(key, (None, 0))
        if images is None or images._version != version:  # a student that writes into its input spoils it for itself
            images = student.prepare(pixels.flatten(0, 1).to(self.device, non_blocking=True))
            self.made[key] = images, images._version
        return images


def _local(lesson: Lesson) -> bool:
    """Whether its students see local crops."""
    return any(name.startswith("local_") for name in lesson.method.needs.outputs)


def _who(apprentice: Apprentice) -> dict[str, Any]:
    """What a student is, for a run's identity."""
    student = apprentice.student
    looks = student.preprocessing.record()
    return {"spec": student.spec, "preprocessing": looks, "width": student.width, "initial": student.digest()}


def _size(apprentice: Apprentice) -> tuple[int, str]:
    wants = apprentice.student.preprocessing
    return wants.size, wants.interpolation
