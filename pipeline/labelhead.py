"""A linear head on stored embeddings, fitted to a few labels: what turns a teacher without labels to a task.

logits = unit(f) W^T + b. The features' mean and scale are folded into W and b, so the file is the head.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline import philox
from pipeline.artifact import UserError
from pipeline.bank import unit
from pipeline.storage import Folder
from pipeline.weights import spell

STEEP = 1e-2  # features that vary less than this share of the mean variation are not blown up


class LabelHead(nn.Module):
    """(..., D) embeddings, of any length -> (..., C) logits."""

    weight: Tensor  # (C, D)
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, names: Sequence[str]):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.names = tuple(names)

    @property
    def classes(self) -> int:
        return len(self.names)

    def forward(self, embedding: Tensor) -> Tensor:
        return unit(embedding) @ self.weight.T + self.bias


def fit(features: np.ndarray, label: np.ndarray, names: Sequence[str], strength: float = 1.0) -> LabelHead:
    """Multinomial logistic regression on standardised unit embeddings (n, D), by L-BFGS to convergence.

    label (n,) in 0..C-1; strength: the inverse of the L2 penalty, scikit-learn's C. A class without
    examples is never predicted. Raises UserError if fewer than two classes have examples.
    """
    from sklearn.linear_model import LogisticRegression

    u = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    mean, deviation = u.mean(0), u.std(0)
    scale = 1.0 / np.maximum(deviation, STEEP * deviation.mean())
    if len(np.unique(label)) < 2:
        raise UserError("a head needs labelled images of two classes at least; label more of them")
    found = LogisticRegression(C=strength, max_iter=2000).fit((u - mean) * scale, label)
    coefficients, intercept = found.coef_, found.intercept_
    if len(found.classes_) == 2:  # scikit-learn keeps one row for two classes
        coefficients, intercept = np.stack([-coefficients[0], coefficients[0]]) / 2, np.array([-1, 1]) * intercept / 2
    weight = np.zeros((len(names), u.shape[1]))
    bias = np.full(len(names), float(intercept.min()) - 20.0)
    weight[found.classes_] = coefficients * scale
    bias[found.classes_] = intercept - (coefficients * scale) @ mean
    return LabelHead(torch.from_numpy(weight).float(), torch.from_numpy(bias).float(), names)


def choose(label: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Rows of a share of the labelled images, the same share of every class and at least one: ascending."""
    picked = []
    for y in np.unique(label[label >= 0]):
        rows = np.flatnonzero(label == y)
        order = philox.permutation(seed, philox.PICK, int(y), len(rows))
        picked.append(rows[order[: max(1, round(share * len(rows)))]])
    return np.sort(np.concatenate(picked)) if picked else np.empty(0, np.int64)


def save(head: LabelHead, file: Path, said: dict[str, str]) -> None:
    """Weight, bias and the class names, as safetensors."""
    tensors = {"weight": head.weight, "bias": head.bias}
    Folder(file.parent).put(file.name, spell(tensors, {"classes": json.dumps(head.names), **said}))


def load(file: Path, width: int) -> LabelHead:
    """Raises UserError if there is none, or it is for embeddings of another width."""
    try:
        with safetensors.safe_open(file, "pt") as opened:
            names = json.loads((opened.metadata() or {})["classes"])
            head = LabelHead(opened.get_tensor("weight"), opened.get_tensor("bias"), names)
    except (FileNotFoundError, safetensors.SafetensorError, KeyError, ValueError) as wrong:
        why = " ".join(str(wrong).split())[:120]
        raise UserError(f"{file} is no head of compress label-head ({why}); make one from the store") from None
    if head.weight.shape != (len(names), width):
        raise UserError(
            f"{file} is for embeddings of {head.weight.shape[1]} dimensions, and the store's have {width}; "
            "make one from this store with compress label-head"
        )
    return head
