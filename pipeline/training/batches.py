"""What a training step takes in: pixels from the loader, teacher features from the store, input images of students."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress_ssl.pipeline.datasets.base import Dataset
from compress_ssl.pipeline.datasets.decode import GOOD
from compress_ssl.pipeline.methods.base import Batch
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.training.learner import Learner
from compress_ssl.pipeline.training.prepared_images import PreparedImages
from compress_ssl.pipeline.training.sampler import StepSampler
from compress_ssl.pipeline.training.student import Student
from compress_ssl.pipeline.training.teacher_features import TeacherFeatures
from compress_ssl.pipeline.views.augment import ViewSpec
from compress_ssl.pipeline.views.loader import ViewBatch, ViewDataset, iterate_views
from compress_ssl.pipeline.views.numbering import view_name
from compress_ssl.pipeline.views.render import default_local_size


@dataclass
class BatchSource:
    """Reads and checks what each step of a sampler needs, once for all learners of a run."""

    store: FeatureStore
    dataset: Dataset
    sampler: StepSampler
    learners: Sequence[Learner]
    device: torch.device
    spec: ViewSpec = field(init=False)  # how the store's views were drawn; students see views drawn alike
    features: dict[str, TeacherFeatures] = field(init=False)  # by name of the store's array
    content: np.ndarray = field(init=False)  # (N,) uint64 hashes of the images that the teacher saw

    def __post_init__(self) -> None:
        self.spec = self.store.identity.views
        arrays = dict.fromkeys(name for learner in self.learners for name in learner.method.needs.arrays)
        # A batch that crosses an epoch's end uses the views of two epochs: twice the views of a step.
        min_views = {True: len(self.sampler.local), False: 2 * self.sampler.views_per_step}
        self.features = {
            name: TeacherFeatures(self.store, name, min_views=min_views[name.startswith("local_")]) for name in arrays
        }
        self.content = self.store.table("content")

    @property
    def students(self) -> list[Student]:
        """All students, learner by learner."""
        return [student for learner in self.learners for student in learner.students]

    # ---------------------------------------------------------------- pixels

    def load_views(self, workers: int, first: int) -> Generator[ViewBatch, None, None]:
        """Pixels of steps first, first + 1, ... to the last. workers: loader processes; 0 loads in this process."""
        requests: Any = replace(self.sampler, first=first)  # a Sequence[ViewRequest] for the loader
        local_sizes = self._local_sizes() if self.sampler.has_local else []
        view_dataset = ViewDataset(
            self.dataset, self.spec, self.store.table("view_key"), self._image_sizes(), requests, local_sizes
        )
        return iterate_views(view_dataset, workers, pin=self.device.type == "cuda")

    def require_unchanged(self, batch: Batch, view_batch: ViewBatch) -> None:
        """Raises UserError if an image is unreadable now or its stored bytes are not those that the teacher saw."""
        rows = batch.rows.cpu().numpy()
        changed = np.flatnonzero((view_batch.content != self.content[rows]) | (view_batch.status != GOOD))
        if len(changed):
            i = int(rows[changed[0]])
            why = view_batch.bad.get(i, "its content differs from what the teacher saw")
            remedy = self.dataset.remedy
            raise UserError(
                f"image {self.dataset.ids[i]} changed since the export: {why}; {remedy}, or export into a new store"
            )

    def prepare_inputs(
        self, learner: Learner, view_batch: ViewBatch, prepared: PreparedImages
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Input images of a learner's students on the device.

        Returns (images (B * W, 3, S, S) per student, local crops (B * L, 3, s, s) per student); the second list
        is empty for a method without local crops. Independent peers each take their own share of the W views.
        """
        count, independent = len(learner.students), learner.method.needs.independent
        images, local = [], []
        for number, student in enumerate(learner.students):
            pixels = view_batch.pixels[self._image_sizes().index(student.image_size)]  # (B, W, 3, S, S)
            if independent:
                pixels = pixels.chunk(count, 1)[number]
            images.append(prepared.prepare(student, pixels, (number, independent and count)))
            if needs_local_crops(learner):
                crops = view_batch.local[self._local_sizes().index(self._local_size(student))]  # (B, L, 3, s, s)
                local.append(prepared.prepare(student, crops, (number, "local")))
        return images, local

    # ---------------------------------------------------------------- teacher features

    def build_batch(self, step: int) -> Batch:
        """The step's (i, v) and teacher features on the device, without images yet.

        Raises UserError for features that are not finite.
        """
        rows, student_views, teacher_views = self.sampler.step_indices(step)
        local_views, teacher = self.sampler.step_local_views(step), {}
        for name, features in self.features.items():
            views = local_views if name.startswith("local_") else teacher_views
            assert views is not None  # the sampler has local views if a method reads local arrays
            all_rows, all_views = rows.repeat(views.shape[1]), views.flatten()  # (b * W,), for local crops (b * L,)
            values = features.read(all_rows, all_views)
            self._require_finite(name, values, all_rows, all_views)
            teacher[name] = torch.from_numpy(values).unflatten(0, views.shape).to(self.device)
        i, v, u = (torch.from_numpy(part).to(self.device) for part in (rows, student_views, teacher_views))
        local = None if local_views is None else torch.from_numpy(local_views).to(self.device)
        return Batch(step, i, v, u, teacher, [], local_views=local)

    def read_features(self, rows: Tensor, views: Tensor, name: str = "embedding") -> Tensor:
        """(n, ...) float32 teacher features of (rows[j], views[j]), for memory banks.

        Raises UserError for features that are not finite.
        """
        features = self.features.get(name) or TeacherFeatures(self.store, name)
        i, v = rows.cpu().numpy(), views.cpu().numpy()
        values = features.read(i, v)
        self._require_finite(name, values, i, v)
        return torch.from_numpy(values)

    def _require_finite(self, name: str, values: np.ndarray, rows: np.ndarray, views: np.ndarray) -> None:
        sums = values.sum(tuple(range(1, values.ndim)))  # NaN and infinity survive a sum
        if not np.isfinite(sums).all():
            j = int(np.flatnonzero(~np.isfinite(sums))[0])
            raise UserError(
                f"{self.store.storage}: {name} of image {self.dataset.ids[int(rows[j])]} in {view_name(int(views[j]))} "
                "is not finite; find the damage with compress verify"
            )

    # ---------------------------------------------------------------- sizes

    def require_sizes(self) -> None:
        """Raises UserError if a student cannot process local crops of the size that its method would show it."""
        for learner in self.learners:
            if needs_local_crops(learner):
                for student in learner.students:
                    student.model.require_size(self._local_size(student)[0], "--image-size")

    def _image_sizes(self) -> list[tuple[int, str]]:
        """The distinct (side, interpolation) of all students, in the order in which the loader renders them."""
        return list(dict.fromkeys(student.image_size for student in self.students))

    def _local_sizes(self) -> list[tuple[int, str]]:
        return list(dict.fromkeys(self._local_size(student) for student in self.students))

    def _local_size(self, student: Student) -> tuple[int, str]:
        """(side, interpolation) of a student's local crops.

        The ratio of local crop to image is the teacher's, rounded to a multiple of 8 pixels; where the store has
        no local crops, it is the published ratio of `default_local_size`.
        """
        size, interpolation = student.image_size
        crop_size = self.store.identity.local_size
        if not crop_size:
            return default_local_size(size), interpolation
        teacher_size = self.store.identity.teacher.preprocessing.size
        return max(8, 8 * round(size * crop_size / teacher_size / 8)), interpolation


def needs_local_crops(learner: Learner) -> bool:
    """Whether the learner's method computes a loss on local crops."""
    return any(name.startswith("local_") for name in learner.method.needs.outputs)
