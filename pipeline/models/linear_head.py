"""A linear classifier on embeddings: fitted to a few labels for a teacher, or what a student learned from one.

logits = f W^T + b, with f brought to unit length first where the head says so. The file is the head: weight (C, d),
bias (C,), and in its metadata, as JSON, `classes`, their names or null, and `unit`; besides `weights`, the digest of
the model whose embeddings it is for.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from compress_ssl.pipeline.models import weights
from compress_ssl.pipeline.models.precision import at_least_float32, l2_normalize
from compress_ssl.pipeline.runtime import philox
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.storage import Folder

MIN_DEVIATION = 1e-2  # features that vary less than this share of the mean variation are not blown up


class LinearHead(nn.Module):
    """(..., d) embeddings -> (..., C) logits; with `unit` the embeddings' length does not matter."""

    weight: Tensor  # (C, d)
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, names: Sequence[str] | None, *, unit: bool = True):
        """names: of the classes, None where nobody knows them. Raises ValueError if the parts do not fit."""
        super().__init__()
        if weight.ndim != 2 or bias.shape != weight.shape[:1]:
            shapes = tuple(weight.shape), tuple(bias.shape)
            raise ValueError(f"weight and bias have shapes {shapes}, not (C, d), (C,)")
        if names is not None and not len(set(names)) == len(names) == len(weight):
            raise ValueError(f"{len(set(names))} names for {len(weight)} classes")
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.names = None if names is None else tuple(names)
        self.unit = unit
        self.of = ""  # digest of its model's weights, where the file says so

    @property
    def classes(self) -> int:
        return len(self.weight)

    @property
    def width(self) -> int:
        return self.weight.shape[1]

    def forward(self, embedding: Tensor) -> Tensor:
        return (l2_normalize(embedding) if self.unit else at_least_float32(embedding)) @ self.weight.T + self.bias


def fit(features: np.ndarray, label: np.ndarray, names: Sequence[str], strength: float = 1.0) -> LinearHead:
    """Multinomial logistic regression on standardised unit embeddings (n, D), by L-BFGS to convergence.

    label (n,) in 0..C-1; strength: the inverse of the L2 penalty, scikit-learn's C. A class without
    examples is never predicted. Raises UserError if fewer than two classes have examples.
    """
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(label)) < 2:
        raise UserError("a head needs labelled images of two classes at least; label more of them")
    u = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    mean, deviation = u.mean(0), u.std(0)
    scale = 1.0 / np.maximum(deviation, MIN_DEVIATION * deviation.mean())
    found = LogisticRegression(C=strength, max_iter=2000).fit((u - mean) * scale, label)
    coefficients, intercept = found.coef_, found.intercept_
    if len(found.classes_) == 2:  # scikit-learn keeps one row for two classes
        coefficients, intercept = np.stack([-coefficients[0], coefficients[0]]) / 2, np.array([-1, 1]) * intercept / 2
    weight = np.zeros((len(names), u.shape[1]))
    bias = np.full(len(names), float(intercept.min()) - 20.0)
    weight[found.classes_] = coefficients * scale
    bias[found.classes_] = intercept - (coefficients * scale) @ mean
    return LinearHead(torch.from_numpy(weight).float(), torch.from_numpy(bias).float(), names)


def choose_labelled(label: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Rows of a share of the labelled images, the same share of every class and at least one: ascending."""
    picked = []
    for y in np.unique(label[label >= 0]):
        rows = np.flatnonzero(label == y)
        order = philox.permutation(seed, philox.PICK, int(y), len(rows))
        picked.append(rows[order[: max(1, round(share * len(rows)))]])
    return np.sort(np.concatenate(picked)) if picked else np.empty(0, np.int64)


def to_bytes(head: LinearHead, said: Mapping[str, str] | None = None) -> bytes:
    """The file. said: more for its metadata."""
    about = {"classes": json.dumps(head.names), "unit": json.dumps(head.unit)}
    return weights.to_bytes({"weight": head.weight, "bias": head.bias}, {**about, **(said or {})})


def save(head: LinearHead, file: Path, said: Mapping[str, str] | None = None) -> None:
    """Write the file, whole or not at all."""
    Folder(file.parent).put(file.name, to_bytes(head, said))


def load(file: Path) -> LinearHead:
    """Raises UserError if there is none, or the file is damaged or something else."""
    try:
        if file.is_dir():
            raise ValueError("it is a folder")
        with safetensors.safe_open(file, "pt") as opened:
            said = opened.metadata() or {}
            if "classes" not in said:
                raise ValueError("it says nothing of classes")
            tensors = opened.get_tensor("weight"), opened.get_tensor("bias")
            names = json.loads(said["classes"])
            unit = json.loads(said.get("unit", "true"))  # a label head of before says nothing of it
            head = LinearHead(*tensors, names, unit=bool(unit))
            head.of = said.get("weights", "")
        if not (head.weight.isfinite().all() and head.bias.isfinite().all()):
            raise ValueError("its numbers are not finite")
    except (OSError, safetensors.SafetensorError, ValueError, TypeError) as wrong:
        why = " ".join(str(wrong).split())[:120]
        raise UserError(
            f"{file} is no linear head ({why}); make one with compress label-head, or repeat the distill command of "
            "simclr-v2, which writes RUN/head.safetensors anew"
        ) from None
    return head
