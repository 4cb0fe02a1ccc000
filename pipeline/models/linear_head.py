"""A linear classifier on embeddings, fitted to a few labels or trained together with a student.

logits = f W^T + b, where f is the embedding, divided by its length if `unit` is set.

The file is in safetensors format: tensors `weight` (C, d) and `bias` (C,), and in the metadata

    classes    names of the C classes as JSON, or null
    unit       true or false, as JSON; files written before this key existed mean true
    weights    digest of the model whose embeddings the head is for; may be missing
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
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.records import InvalidRecord, parse_json, read_record
from compress_ssl.pipeline.runtime.storage import Folder

MIN_DEVIATION = 1e-2
"""Lower bound of a feature's standard deviation, as a fraction of the mean over features.

Standardisation divides by the deviation; the bound keeps it from amplifying a nearly constant feature.
"""

MAX_ITERATIONS = 2000
"""Of L-BFGS; scikit-learn's default of 100 often ends before convergence."""

ABSENT_CLASS_MARGIN = 20.0
"""A class without examples has zero weights and a bias this far below the smallest fitted bias (a logit)."""


class LinearHead(nn.Module):
    """Embeddings (..., d) -> logits (..., C). With `unit` set, the length of an embedding does not matter."""

    weight: Tensor  # (C, d)
    bias: Tensor  # (C,)

    def __init__(self, weight: Tensor, bias: Tensor, names: Sequence[str] | None, *, unit: bool = True):
        """names: of the C classes, None if they are unknown. Raises ValueError if the parts do not fit each other."""
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
        self.of = ""  # digest of the model whose embeddings the head is for; "" if the file does not hold one

    @property
    def classes(self) -> int:
        """C, the number of classes."""
        return len(self.weight)

    @property
    def width(self) -> int:
        """d, the number of dimensions of an embedding."""
        return self.weight.shape[1]

    def forward(self, embedding: Tensor) -> Tensor:
        """(..., d) -> (..., C), in float32 or float64."""
        features = l2_normalize(embedding) if self.unit else at_least_float32(embedding)
        return features @ self.weight.T + self.bias


# ---------------------------------------------------------------- fitting


def fit(features: np.ndarray, label: np.ndarray, names: Sequence[str], strength: float = 1.0) -> LinearHead:
    """Multinomial logistic regression on standardised unit embeddings, by L-BFGS to convergence.

    features (n, d); label (n,) integers in 0..C-1; names: of the C classes; strength: the inverse of the L2
    penalty, C in scikit-learn. The standardisation is folded into weight and bias. A class without examples
    is never predicted. Raises UserError if fewer than two classes have examples.
    """
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(label)) < 2:
        raise UserError("a head needs labelled images of two classes at least; label more of them")
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    mean, deviation = unit.mean(0), unit.std(0)
    scale = 1.0 / np.maximum(deviation, MIN_DEVIATION * deviation.mean())
    fitted = LogisticRegression(C=strength, max_iter=MAX_ITERATIONS).fit((unit - mean) * scale, label)
    coefficients, intercept = fitted.coef_, fitted.intercept_
    if len(fitted.classes_) == 2:  # scikit-learn keeps one row for two classes: the logit of the second
        coefficients, intercept = np.stack([-coefficients[0], coefficients[0]]) / 2, np.array([-1, 1]) * intercept / 2
    weight = np.zeros((len(names), unit.shape[1]))
    bias = np.full(len(names), float(intercept.min()) - ABSENT_CLASS_MARGIN)
    weight[fitted.classes_] = coefficients * scale
    bias[fitted.classes_] = intercept - (coefficients * scale) @ mean
    return LinearHead(torch.from_numpy(weight).float(), torch.from_numpy(bias).float(), names)


def choose_labelled(label: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Rows of a stratified sample of the labelled images, ascending.

    label (N,) integers, -1 for images without label; share: fraction of each class, in (0, 1]; at least one
    image of each class is chosen. The rows are a function of label, share and seed.
    """
    chosen = []
    for y in np.unique(label[label >= 0]):
        rows = np.flatnonzero(label == y)
        order = philox.permutation(seed, philox.PICK, int(y), len(rows))
        chosen.append(rows[order[: max(1, round(share * len(rows)))]])
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, np.int64)


# ---------------------------------------------------------------- the file


def to_bytes(head: LinearHead, metadata: Mapping[str, str] | None = None) -> bytes:
    """The content of the file. metadata: further entries besides `classes` and `unit`."""
    own = {"classes": json.dumps(head.names), "unit": json.dumps(head.unit)}
    return weights.to_bytes({"weight": head.weight, "bias": head.bias}, {**own, **(metadata or {})})


def save(head: LinearHead, file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write the file: under another name first, then renamed, so that it is never half written."""
    Folder(file.parent).put(file.name, to_bytes(head, metadata))


def load(file: Path) -> LinearHead:
    """Read a head from its file. Raises UserError if there is no such file, or it is damaged or holds no head."""
    try:
        if file.is_dir():
            raise ValueError("it is a folder")
        with safetensors.safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            if "classes" not in metadata:
                raise ValueError("its metadata has no classes")
            tensors = opened.get_tensor("weight"), opened.get_tensor("bias")
            classes = parse_json(metadata["classes"], "classes")
            names = None if classes is None else read_record(list[str], classes, "classes")
            unit = read_record(bool, parse_json(metadata.get("unit", "true"), "unit"), "unit")
            if not all(tensor.is_floating_point() for tensor in tensors):
                raise ValueError("its numbers are no floats")
            weight, bias = (tensor.float() for tensor in tensors)  # a file may hold them in half precision
            head = LinearHead(weight, bias, names, unit=unit)
            head.of = metadata.get("weights", "")
        if not (head.weight.isfinite().all() and head.bias.isfinite().all()):
            raise ValueError("its numbers are not finite")
    except (OSError, safetensors.SafetensorError, ValueError, TypeError, InvalidRecord) as error:
        why = " ".join(str(error).split())[:120]
        raise UserError(
            f"{file} is no linear head ({why}); make one with compress label-head, or repeat the distill command of "
            "simclr-v2, which writes RUN/head.safetensors anew"
        ) from None
    return head
