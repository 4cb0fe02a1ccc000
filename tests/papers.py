"""What methods are tried on, and the arithmetic of their papers in plain Python, one number after another."""

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
from compress_ssl.pipeline.views.numbering import LOCAL

IMAGES, VIEWS, CROPS, B, SIZE = 20, 5, 3, 4, 8
D, P, C, REGIONS, d, SEEN = 6, 5, 4, 7, 5, 3  # widths of the teacher, its regions; width and regions of the student
WIDTHS: dict[str, tuple[int, ...]] = {
    "embedding": (D,), "projection": (P,), "logits": (C,), "regions": (REGIONS, D), "local_embedding": (D,),
    "local_projection": (P,),
}  # fmt: skip


def noise(seed: int, *shape: int) -> Tensor:
    """float64 normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STORE = {
    name: 3 * noise(number, IMAGES, CROPS if name.startswith("local_") else VIEWS, *shape)
    for number, (name, shape) in enumerate(WIDTHS.items())
}


def read(rows: Tensor, views: Tensor, array: str = "embedding") -> Tensor:
    return STORE[array][rows, views & ~LOCAL].float()


def student(seed: int = 0) -> Embedder:
    """d dimensions, more than one region."""
    torch.manual_seed(seed)
    return build(f"convnet:channels=4+{d}", image_size=SIZE)


def learner(
    order: str, arrays: Sequence[str] = ("embedding",), peers: int = 1, heads: Mapping[str, Tensor] | None = None
) -> Method:
    """A method in float64, its banks filled, for a store of these arrays."""
    widths = {name: WIDTHS[name] for name in arrays}
    context = MethodContext(
        [student(n) for n in range(peers)], widths, np.arange(IMAGES), 1, 0, heads=heads or {}, images=IMAGES
    )
    made = METHODS.build(order, context=context)
    made.notes = context.notes
    made.refill_banks(read)
    made.train()
    return made.double()


def batch(step: int, arrays: Sequence[str] = ("embedding",), w: int = 1, peers: int = 1, crops: int = 0) -> Batch:
    """B images that come round again, the peers in w views each that change with the step."""
    rows = (torch.arange(B) + step * B) % IMAGES
    views = 1 + (torch.arange(w * peers) + step).expand(B, w * peers) % (VIEWS - 1)
    local = LOCAL + torch.arange(crops).expand(B, crops) if crops else None
    teacher = {
        name: STORE[name][rows[:, None], (local & ~LOCAL) if local is not None and name.startswith("local_") else views]
        for name in arrays
    }
    return Batch(step, rows, views, views, teacher, [], local_views=local)


def looks(step: int, w: int = 1, crops: int = 0, peer: int = 0, regions: bool = False) -> Outputs:
    """What a student might make of a batch; every tensor is a leaf that takes gradients."""
    out = {"embedding": noise(100 + 10 * step + peer, B, w, d)}
    if crops:
        out["local_embedding"] = noise(200 + 10 * step + peer, B, crops, d)
    if regions:
        out["regions"] = noise(300 + step, B, w, SEEN, d)
        out |= {"local_regions": noise(400 + step, B, crops, 2, d)} if crops else {}
    return {name: value.requires_grad_() for name, value in out.items()}


def losses(method: Method, what: Batch, outputs: Sequence[Outputs]) -> list[float]:
    """A whole step as the loop takes it."""
    made = method(what, outputs)
    torch.stack(made).sum().backward()
    method.after_step(what)
    return [float(loss.detach()) for loss in made]


def gradients_check(method: Method, what: Batch, outputs: Outputs, wanted: int = 0) -> bool:
    """Whether the derivatives in what the student made are those of the loss, which a seed makes repeatable."""
    names = list(outputs)

    def loss(*values: Tensor) -> Tensor:
        torch.manual_seed(0)
        return method(what, [dict(zip(names, values, strict=True))])[wanted]

    return torch.autograd.gradcheck(loss, tuple(outputs.values()))


# ---------------------------------------------------------------- slowly

Vector = list[float]


def dot(x: Vector, y: Vector) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


def norm(x: Vector) -> Vector:
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


def through(layer: Any, x: Vector) -> Vector:
    """A linear layer."""
    bias = [0.0] * layer.out_features if layer.bias is None else layer.bias.tolist()
    return [dot(row, x) + b for row, b in zip(layer.weight.tolist(), bias, strict=True)]
