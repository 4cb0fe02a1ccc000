"""What a training step takes in: pixels from the loader, teacher features from the store, input images of students."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace

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
from compress_ssl.pipeline.views.groups import GLOBAL_VIEWS, ViewGroup, group_of_array, view_name
from compress_ssl.pipeline.views.loader import Sizes, ViewBatch, ViewDataset, iterate_views


@dataclass
class BatchSource:
    """Reads and checks what each step of a sampler needs, once for all learners of a run."""

    store: FeatureStore
    dataset: Dataset
    sampler: StepSampler
    learners: Sequence[Learner]
    device: torch.device
    spec: ViewSpec = field(init=False)  # how the store's views were drawn; students see views drawn alike
    sizes: dict[str, Sizes] = field(init=False)  # distinct (side, interpolation) of students, by name of the group
    features: dict[str, TeacherFeatures] = field(init=False)  # by name of the store's array
    content: np.ndarray = field(init=False)  # (N,) uint64 hashes of the images that the teacher saw

    def __post_init__(self) -> None:
        self.spec = self.store.identity.views
        self.sizes = {
            group.name: list(dict.fromkeys(_image_size(student, group) for student in self.students))
            for group in self.groups
        }
        # A batch that crosses an epoch's end uses the paired views of two epochs: twice the views of a step.
        min_views = {group.name: group.count for group in self.sampler.beside}
        min_views[GLOBAL_VIEWS.name] = 2 * self.sampler.views_per_step
        self.features = {
            name: TeacherFeatures(self.store, name, min_views=min_views[group_of_array(name).name])
            for learner in self.learners
            for name in learner.method.needs.arrays
        }
        self.content = self.store.table("content")

    @property
    def students(self) -> list[Student]:
        """All students, learner by learner."""
        return [student for learner in self.learners for student in learner.students]

    @property
    def groups(self) -> tuple[ViewGroup, ...]:
        """The groups of views that a step shows: the global views, which students and teacher are paired on, first."""
        return GLOBAL_VIEWS, *self.sampler.beside

    # ---------------------------------------------------------------- pixels

    def load_views(self, workers: int, first: int) -> Generator[ViewBatch, None, None]:
        """Pixels of steps first, first + 1, ... to the last. workers: loader processes; 0 loads in this process."""
        requests = replace(self.sampler, first=first)
        view_dataset = ViewDataset(self.dataset, self.spec, self.store.table("view_key"), self.sizes, requests)
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
    ) -> list[tuple[ViewGroup, list[Tensor]]]:
        """Input images of a learner's students on the device: [(group of views, (B * V, 3, S, S) per student), ...].

        No images of a group that the method computes no loss on. Independent peers each take their own share of the W
        global views.
        """
        return [
            (group, self._prepare_group(group, learner, view_batch, prepared) if _shows(learner, group) else [])
            for group in self.groups
        ]

    def _prepare_group(
        self, group: ViewGroup, learner: Learner, view_batch: ViewBatch, prepared: PreparedImages
    ) -> list[Tensor]:
        """Input images (B * V, 3, S, S) of one group of views per student."""
        divided = learner.method.needs.independent and group.name == GLOBAL_VIEWS.name
        shares, images = len(learner.students) if divided else 1, []
        for number, student in enumerate(learner.students):
            of_size = self.sizes[group.name].index(_image_size(student, group))
            pixels = view_batch.pixels[group.name][of_size].chunk(shares, 1)[number % shares]  # (B, V, 3, S, S)
            images.append(prepared.prepare(student, pixels, (group.name, number, shares)))
        return images

    # ---------------------------------------------------------------- teacher features

    def build_batch(self, step: int) -> Batch:
        """The step's (i, v) and teacher features on the device, without images yet.

        Raises UserError for features that are not finite.
        """
        rows, student_views, teacher_views = self.sampler.step_indices(step)
        beside, teacher = self.sampler.step_views_beside(step), {}
        views_of = {GLOBAL_VIEWS.name: teacher_views, **beside}
        for name, features in self.features.items():
            views = views_of[group_of_array(name).name]
            all_rows, all_views = rows.repeat(views.shape[1]), views.flatten()  # (b * V,)
            values = features.read(all_rows, all_views)
            self._require_finite(name, values, all_rows, all_views)
            teacher[name] = torch.from_numpy(values.reshape(*views.shape, *values.shape[1:])).to(self.device)
        i, v, u = (torch.from_numpy(part).to(self.device) for part in (rows, student_views, teacher_views))
        batch = Batch(step, i, v, u, teacher, [])
        for group in self.sampler.beside:
            batch.set_views(group, torch.from_numpy(beside[group.name]).to(self.device))
        return batch

    def read_features(self, rows: Tensor, views: Tensor, name: str = "embedding") -> Tensor:
        """(n, ...) float32 teacher features of (rows[j], views[j]), for memory banks.

        Raises UserError for an (i, v) that the store does not hold, and for features that are not finite.
        """
        features = self.features.get(name) or TeacherFeatures(self.store, name)
        i, v = rows.cpu().numpy(), views.cpu().numpy()
        absent = (i < 0) | (i >= self.store.images) | ~np.isin(v, self.store.all_views)
        if absent.any():
            j = int(np.flatnonzero(absent)[0])
            raise UserError(
                f"{self.store.storage} has no {name} of row {i[j]} in view {v[j]}, which a memory bank of a checkpoint "
                "names; delete the run's newest checkpoint to continue from an earlier one"
            )
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
        """Raises UserError if a student cannot process views of the size that its method would show it."""
        for learner in self.learners:
            for group in self.sampler.beside:
                for student in learner.students if _shows(learner, group) else []:
                    student.model.require_size(_image_size(student, group)[0], "--image-size")


def _image_size(student: Student, group: ViewGroup) -> tuple[int, str]:
    """(side, interpolation) of a student's images of a group. Other groups than the global views have smaller ones."""
    size, interpolation = student.image_size
    return group.side(size), interpolation


def _shows(learner: Learner, group: ViewGroup) -> bool:
    """Whether the learner's method computes a loss on this group of views."""
    return any(group_of_array(name).name == group.name for name in learner.method.needs.outputs)
