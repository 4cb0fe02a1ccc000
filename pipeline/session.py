"""A training run: what each step looks at, and the apprentices who learn from it."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import artifact
from pipeline.apprentice import Apprentice
from pipeline.artifact import UserError
from pipeline.images import GOOD
from pipeline.loader import Eyes, Sight, feed
from pipeline.method import Batch
from pipeline.model import Preprocessing
from pipeline.pairs import Features, Plan
from pipeline.pixels import require_same
from pipeline.storage import Folder
from pipeline.store import FeatureStore
from pipeline.views import ViewSpec


@dataclass
class Session:
    """Pixels and teacher features of every step of a plan, for all apprentices alike."""

    store: FeatureStore
    dataset: Any
    plan: Plan
    apprentices: list[Apprentice]
    device: torch.device
    spec: ViewSpec = field(init=False)
    features: Features = field(init=False)
    content: np.ndarray = field(init=False)  # (N,) uint64: the images the teacher saw

    def __post_init__(self) -> None:
        self.spec = ViewSpec(**self.store.identity["views"])
        self.features = Features(self.store, least=2 * self.plan.per_step)
        self.content = self.store.table("content")

    @property
    def start(self) -> int:
        """Steps that all apprentices have behind them."""
        return min(apprentice.start for apprentice in self.apprentices)

    @property
    def per_epoch(self) -> float:
        """Steps in an epoch."""
        return len(self.plan.rows) / self.plan.batch

    def claim(self, method: str, warmup_epochs: float) -> None:
        """Write each run's manifest, what it is and came from, or compare it with the one that is there.

        The end of the run is not part of what it is: it may grow. Raises Mismatch.
        """
        for apprentice in self.apprentices:
            student, how = apprentice.student, asdict(apprentice.training)
            how["schedule"] |= {"warmup": None, "warmup_epochs": warmup_epochs}
            looks = student.preprocessing.record()
            who = {"spec": student.spec, "preprocessing": looks, "width": student.width, "initial": student.digest()}
            identity = {
                "store": self.store.fingerprint,
                "images": len(self.plan.rows),
                "student": who,
                "method": method,
                "training": how,
                "batch_size": self.plan.batch,
                "pairing": self.plan.pairing,
                "views_per_step": self.plan.per_step,
                "views": list(self.plan.views),
            }
            where = self.store.storage
            about = {
                "store": str(where.path.absolute() if isinstance(where, Folder) else where),
                "data": self.store.about["data"],
                "views": self.plan.views[-1] + 1,
                "views_spec": self.store.identity["views"],
                "parameters": sum(p.numel() for p in student.backbone.parameters()),
                "teacher": self.store.about["teacher"],
                "name": student.name,
            }
            artifact.claim(Folder(apprentice.folder), "run", identity, about)

    def restore(self) -> None:
        """Every apprentice goes back to its newest checkpoint; the banks' anchors are read from the store."""
        for apprentice in self.apprentices:
            apprentice.restore()
            apprentice.method.fill(self.read)

    def read(self, rows: Tensor, views: Tensor) -> Tensor:
        """(n, ...) float32 teacher features of (rows[j], views[j])."""
        return torch.from_numpy(self.features.rows(rows.cpu().numpy(), views.cpu().numpy()))

    def sights(self, workers: int) -> Iterator[Sight]:
        """The pixels of steps start, start + 1, ..."""
        pieces: Any = replace(self.plan, first=self.start)
        return feed(Eyes(self.dataset, self.spec, self.store.table("view_key"), self._sizes(), pieces), workers)

    def step(self, step: int, sight: Sight, measure: bool) -> list[dict[str, Any] | None]:
        """One step of each apprentice -> its row of metrics; None for one who has this step behind it.

        `measure` adds what is not worth its time in every step. Raises UserError for an image that
        the teacher did not see, or a loss that is not finite.
        """
        batch, sizes = self.batch(step), self._sizes()
        self._require_unchanged(batch, sight)
        rows: list[dict[str, Any] | None] = []
        for apprentice in self.apprentices:
            if step < apprentice.start:
                rows.append(None)
                continue
            pixels = sight.pixels[sizes.index(_size(apprentice))].flatten(0, 1)  # (B * W, 3, S, S)
            batch.images = [apprentice.student.prepare(pixels.to(self.device, non_blocking=True))]
            epoch = round((step + 1) / self.per_epoch, 4)
            rows.append({"step": step + 1, "epoch": epoch, **apprentice.step(batch, step / self.plan.steps, measure)})
        return rows

    def batch(self, step: int) -> Batch:
        """The step's (i, v) and the teacher's side of it."""
        rows, student_views, teacher_views = self.plan.at(step)
        picked = self.features.rows(rows.repeat(self.plan.per_step), teacher_views.flatten())
        teacher = torch.from_numpy(picked).unflatten(0, teacher_views.shape)  # (B, W, D)
        i, v, u = (torch.from_numpy(part).to(self.device) for part in (rows, student_views, teacher_views))
        return Batch(step, i, v, u, {"embedding": teacher.to(self.device)}, [])

    def _require_unchanged(self, batch: Batch, sight: Sight) -> None:
        rows = batch.rows.cpu().numpy()
        changed = np.flatnonzero((sight.content != self.content[rows]) | (sight.status != GOOD))
        if len(changed):
            i = int(rows[changed[0]])
            why = sight.bad.get(i, "its content differs from what the teacher saw")
            raise UserError(
                f"image {self.dataset.ids[i]} changed since the export: {why}; put it back, or export into a new store"
            )

    def _sizes(self) -> list[tuple[int, str]]:
        return list(dict.fromkeys(_size(apprentice) for apprentice in self.apprentices))


def _size(apprentice: Apprentice) -> tuple[int, str]:
    wants = apprentice.student.preprocessing
    return wants.size, wants.interpolation


def require_images(store: FeatureStore, dataset: Any, allow_other_pixels: bool) -> str:
    """These are the store's images and look here as they did to the teacher; else in words how not, if allowed.

    Raises UserError for other images, and for other looks unless `allow_other_pixels`.
    """
    if dataset.fingerprint != store.identity["data"]["fingerprint"]:
        raise UserError(
            f"the images are not those of {store.storage}: {dataset.unlike(store.table('sample_id'))}; "
            "give the right ones with --data or export these"
        )
    spec, looks = ViewSpec(**store.identity["views"]), Preprocessing.of(store.identity["teacher"]["preprocessing"])
    return require_same(store.about["pixels"], dataset, spec, looks, store.table("view_key"), allow_other_pixels)
