"""A student of a run: its model, its moving average, its folder, and the weights that it exports."""

import copy
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from compress_ssl.pipeline.datasets.base import Dataset
from compress_ssl.pipeline.models import linear_head
from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.models.linear_head import LinearHead
from compress_ssl.pipeline.models.moving_average import copy_buffers, update_ema
from compress_ssl.pipeline.models.weights import to_bytes
from compress_ssl.pipeline.runtime.records import to_json
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.training.validation import leave_one_out
from compress_ssl.pipeline.views.augment import ViewSpec
from compress_ssl.pipeline.views.groups import group_of_array


class Student:
    """One student of a run. A `Learner` trains it."""

    def __init__(self, folder: Path, model: Embedder, ema: float | None = None):
        """folder: of the student's run. ema: decay per step of a moving average of the weights; None for no average."""
        self.folder, self.model, self.ema = folder, model, ema
        self.average = copy.deepcopy(model).requires_grad_(False) if ema else None
        self.forward: Callable[[Tensor, Sequence[str]], dict[str, Tensor]] = model.forward_outputs
        self.best = -1.0  # highest validation score so far, in percent; negative before the first validation

    @property
    def final_model(self) -> Embedder:
        """The model that is validated and exported: the moving average where there is one."""
        return self.average or self.model

    @property
    def image_size(self) -> tuple[int, str]:
        """(side in pixels, interpolation) of the images that the student takes."""
        preprocessing = self.model.preprocessing
        return preprocessing.size, preprocessing.interpolation

    def enable_outputs(self, outputs: Iterable[str], *, compiled: bool = False) -> None:
        """Enable the outputs that a method needs of any group of views; compiled: run the model by torch.compile."""
        self.model.enable_outputs([group_of_array(name).output(name) for name in outputs])
        if compiled:
            self.forward = torch.compile(self.model.forward_outputs)

    def update_average(self) -> None:
        """Update the moving average; called after the optimizer's step. Buffers (batch norm statistics) are copied."""
        if self.average is not None and self.ema:
            update_ema(self.average, self.model, self.ema)
            copy_buffers(self.average, self.model)

    def checkpoint_parts(self) -> dict[str, object]:
        """Name -> what a checkpoint holds of the student."""
        return {"student": self.model, "average": self.average, "best": self.best}

    def validate(self, val: Dataset, spec: ViewSpec, device: torch.device, precision: str, workers: int) -> float:
        """Leave-one-out nearest-neighbour accuracy of `final_model` on view 0 of labelled images, in percent."""
        return leave_one_out(self.final_model, val, spec, device, precision, workers)

    def is_exported(self) -> bool:
        """Whether the folder's student.safetensors holds the weights of `final_model`."""
        return _exported_digest(self.folder / "student.safetensors") == self.final_model.digest()

    def export(self, head: LinearHead | None = None) -> Path:
        """Write student.safetensors and return its path; head: a classifier to write beside it as head.safetensors.

        The file holds the backbone's weights under the names of the library that it comes from, so that this library
        loads them strictly. Its metadata holds the model's spec, its preprocessing and a digest of the weights.
        """
        preprocessing = json.dumps(to_json(self.final_model.preprocessing))
        metadata = {"model": self.final_model.spec, "preprocessing": preprocessing, "digest": self.final_model.digest()}
        folder, name = Folder(self.folder), "student.safetensors"
        _write_if_changed(folder, name, to_bytes(self.final_model.backbone.state_dict(), {"format": "pt", **metadata}))
        if head:
            data = linear_head.to_bytes(head, {"weights": self.final_model.digest()})
            _write_if_changed(folder, "head.safetensors", data)
        return self.folder / name


def _exported_digest(file: Path) -> str | None:
    """Digest of the weights that a student.safetensors claims to hold; None if it is missing or damaged."""
    try:
        with safetensors.safe_open(file, "pt") as opened:
            return (opened.metadata() or {}).get("digest")
    except (OSError, safetensors.SafetensorError):
        return None


def _write_if_changed(folder: Folder, name: str, data: bytes) -> None:
    """Keep a file that holds these bytes already, so that repeating a finished command changes no file."""
    if not (folder.exists(name) and folder.get(name) == data):
        folder.put(name, data)
