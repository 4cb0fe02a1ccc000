"""An apprentice: one student on its way, and what it hands over at the end."""

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from compress_ssl.pipeline.models import linear_head
from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.models.linear_head import LinearHead
from compress_ssl.pipeline.models.moving_average import copy_buffers, update_ema
from compress_ssl.pipeline.models.weights import to_bytes
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.training.validation import leave_one_out
from compress_ssl.pipeline.views.augment import ViewSpec


class Student:
    """One student of a run: its folder, its average, what it delivers. `Lesson` has it learn."""

    def __init__(self, folder: Path, model: Embedder, ema: float | None = None):
        self.folder, self.model, self.ema = folder, model, ema
        self.average = copy.deepcopy(model).requires_grad_(False) if ema else None
        self.forward: Any = model.forward_outputs
        self.best = -1.0

    def enable_outputs(self, outputs: Iterable[str], *, compiled: bool = False) -> None:
        """Have the student give these outputs (`local_` ones too), by torch.compile if asked."""
        self.model.enable_outputs([name.removeprefix("local_") for name in outputs])
        if compiled:
            self.forward = torch.compile(self.model.forward_outputs)

    @property
    def final_model(self) -> Embedder:
        """The student that is evaluated and kept: the average where there is one."""
        return self.average or self.model

    def update_average(self) -> None:
        """Move the average after the student's step."""
        if self.average is not None and self.ema:
            update_ema(self.average, self.model, self.ema)
            copy_buffers(self.average, self.model)

    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds of it, by name."""
        return {"student": self.model, "average": self.average, "best": self.best}

    def validate(self, val: Any, spec: ViewSpec, device: torch.device, precision: str, workers: int) -> float:
        """Leave-one-out nearest-neighbour accuracy on `val`, view 0, in percent."""
        return leave_one_out(self.final_model, val, spec, device, precision, workers)

    def export(self, head: LinearHead | None = None) -> Path:
        """Write student.safetensors: the bare backbone, as its own library names it, and how to feed it.

        head: the classifier that its method delivers besides, as head.safetensors.
        """
        looks = json.dumps(self.final_model.preprocessing.record())
        said = {"model": self.final_model.spec, "preprocessing": looks, "digest": self.final_model.digest()}
        home, name = Folder(self.folder), "student.safetensors"
        _put(home, name, to_bytes(self.final_model.backbone.state_dict(), {"format": "pt", **said}))
        if head:
            _put(home, "head.safetensors", linear_head.to_bytes(head, {"weights": self.final_model.digest()}))
        return self.folder / name


def _put(home: Folder, name: str, data: bytes) -> None:
    if not (home.exists(name) and home.get(name) == data):
        home.put(name, data)
