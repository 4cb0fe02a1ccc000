"""Artificial data for tests of methods, and the papers' arithmetic in plain Python, one number at a time."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress_ssl.pipeline.methods import METHODS
from compress_ssl.pipeline.methods.base import Batch, Method, MethodContext, Outputs
from compress_ssl.pipeline.models import build
from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.views.groups import LOCAL

IMAGES, VIEWS, CROPS, B, SIZE = 20, 5, 3, 4, 8  # N, V, L, images of a batch, side in pixels
D, P, C, REGIONS = 6, 5, 4, 7  # the teacher's embedding, projection and logits, and its regions per view
d, STUDENT_REGIONS = 5, 3
WIDTHS: dict[str, tuple[int, ...]] = {
    "embedding": (D,), "projection": (P,), "logits": (C,), "regions": (REGIONS, D), "local_embedding": (D,),
    "local_projection": (P,),
}  # fmt: skip


def noise(seed: int, *shape: int) -> Tensor:
    """float64 standard normal numbers, a function of the seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STORE = {
    name: 3 * noise(number, IMAGES, CROPS if name.startswith("local_") else VIEWS, *shape)
    for number, (name, shape) in enumerate(WIDTHS.items())
}


def read(rows: Tensor, views: Tensor, array: str = "embedding") -> Tensor:
    """Stored features of (n,) rows and views."""
    return STORE[array][rows, views & ~LOCAL].float()


def build_student(seed: int = 0) -> Embedder:
    """A network of d dimensions with more than one region."""
    torch.manual_seed(seed)
    return build(f"convnet:channels=4+{d}", image_size=SIZE)


def build_method(
    spec: str, arrays: Sequence[str] = ("embedding",), peers: int = 1, heads: Mapping[str, Tensor] | None = None
) -> Method:
    """A method in float64 for a store of these arrays, its banks filled; `context.notes` become its `notes`."""
    widths = {name: WIDTHS[name] for name in arrays}
    context = MethodContext(
        [build_student(n) for n in range(peers)], widths, np.arange(IMAGES), 1, 0, heads=heads or {}, images=IMAGES
    )
    method = METHODS.build(spec, context=context)
    method.notes = context.notes
    method.refill_banks(read)
    method.train()
    return method.double()


def make_batch(step: int, arrays: Sequence[str] = ("embedding",), w: int = 1, peers: int = 1, crops: int = 0) -> Batch:
    """The next B of IMAGES images, w views per peer, which change with the step; images repeat after 5 steps."""
    rows = (torch.arange(B) + step * B) % IMAGES
    views = 1 + (torch.arange(w * peers) + step).expand(B, w * peers) % (VIEWS - 1)
    local = LOCAL + torch.arange(crops).expand(B, crops) if crops else None
    teacher = {
        name: STORE[name][rows[:, None], (local & ~LOCAL) if local is not None and name.startswith("local_") else views]
        for name in arrays
    }
    return Batch(step, rows, views, views, teacher, [], local_views=local)


def student_outputs(step: int, w: int = 1, crops: int = 0, peer: int = 0, regions: bool = False) -> Outputs:
    """Random student outputs for a batch; every tensor is a leaf that requires a gradient."""
    out = {"embedding": noise(100 + 10 * step + peer, B, w, d)}
    if crops:
        out["local_embedding"] = noise(200 + 10 * step + peer, B, crops, d)
    if regions:
        out["regions"] = noise(300 + step, B, w, STUDENT_REGIONS, d)
        out |= {"local_regions": noise(400 + step, B, crops, 2, d)} if crops else {}
    return {name: value.requires_grad_() for name, value in out.items()}


def take_step(method: Method, batch: Batch, outputs: Sequence[Outputs]) -> list[float]:
    """The losses of a step with backward pass and after_step, as the training loop calls them, without optimizer."""
    losses = method(batch, outputs)
    torch.stack(losses).sum().backward()
    method.after_step(batch)
    return [float(loss.detach()) for loss in losses]


def gradient_is_exact(method: Method, batch: Batch, outputs: Outputs, peer: int = 0) -> bool:
    """Whether autograd's gradient of a peer's loss in the student's outputs equals finite differences."""
    names = list(outputs)

    def loss(*values: Tensor) -> Tensor:
        torch.manual_seed(0)  # a loss that draws random numbers has to draw the same ones every time
        return method(batch, [dict(zip(names, values, strict=True))])[peer]

    return torch.autograd.gradcheck(loss, tuple(outputs.values()))


# ---------------------------------------------------------------- the papers' arithmetic

Vector = list[float]


def dot(x: Vector, y: Vector) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


def normalize(x: Vector) -> Vector:
    return [value / math.sqrt(dot(x, x)) for value in x]


def softmax(logits: Vector) -> Vector:
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def cross_entropy(p: Vector, logits: Vector) -> float:
    """-sum p log softmax(logits)"""
    top = max(logits)
    total = top + math.log(sum(math.exp(logit - top) for logit in logits))
    return sum(pj * (total - logit) for pj, logit in zip(p, logits, strict=True))


def kl(p: Vector, q: Vector) -> float:
    return sum(pj * math.log(pj / qj) for pj, qj in zip(p, q, strict=True) if pj > 0)


def apply_linear(layer: Any, x: Vector) -> Vector:
    """layer(x) of a linear layer."""
    bias = [0.0] * layer.out_features if layer.bias is None else layer.bias.tolist()
    return [dot(row, x) + b for row, b in zip(layer.weight.tolist(), bias, strict=True)]
