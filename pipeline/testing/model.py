"""check_model: a test of what export, training and evaluation need of every model, for your own too."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from compress_ssl.pipeline.models import MODELS
from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.registry import PYTHON
from compress_ssl.pipeline.runtime.user_object import UserObject

B = 6
"""Images of the batch that is tried: smooth random patterns, all different."""

TOLERANCE = 1e-3
"""Largest difference, relative to the longest embedding, of two ways to compute one: float32 in another order."""

# ---------------------------------------------------------------- the public check


def check_model(build: Callable[..., object], /, *arguments: object, **options: object) -> None:
    """Build a model, run it on six images, and raise AssertionError if it breaks a requirement.

    The assertions, in their order, and what each protects:

    - The model turns (B, 3, S, S) into (B, d) floating-point numbers, or into what `pool=` reduces to that.
    - Built again from the same seed it has the same weights: verify, dask workers and `compress evaluate` build the
      teacher again and compare its weights with those that the store was made with.
    - In evaluation mode the embeddings are finite, differ between images, come out the same a second time, and no
      weight or buffer changes.
    - The embedding of an image does not depend on the other images of its batch: a store is resumed at any batch.
    - Neither mode changes its input: several students share one batch of images.
    - Images in the channels-last memory format have the same embeddings: that is the default of training.
    - A copy, and a model of other weights into which the state dict is loaded strictly, have the same embeddings:
      averages of weights, checkpoints and student.safetensors hold the state dict and nothing else.
    - In training mode every weight that can be trained has a finite gradient: otherwise it would not be trained.

    build: the function or class, called as build(*arguments, **options). options: its keys, and those that every
    model has (size=, mean=, pool=, weights=, ...), as in a `python:` spec. It runs on the CPU; a large model takes
    as long as about twelve forward passes of six images.

    Example, in a file of tests (the function tiny is in docs/plugins.md):
        from compress_ssl.pipeline.testing import check_model
        from nets import tiny

        def test_tiny_meets_the_requirements_of_a_model():
            check_model(tiny, width=8)
    """
    name = getattr(build, "__name__", type(build).__name__)

    def make(seed: int) -> Embedder:
        torch.manual_seed(seed)
        try:
            embedder: Embedder = MODELS.resolve(PYTHON)(UserObject(name, build, ("model", name)))(*arguments, **options)
            return embedder
        except UserError as wrong:
            raise AssertionError(str(wrong)) from None

    embedder = make(0).eval()
    assert make(0).digest() == embedder.digest(), (
        f"{name} has other weights when it is built again after torch.manual_seed(0); draw initial weights from "
        "torch's generator, or load them from a file"
    )
    images = embedder.prepare(_patterns(embedder.preprocessing.size))
    embeddings = _require_repeatable(embedder, images, name)
    _require_independent(embedder, images, embeddings, name)
    _require_copies(embedder, make(1).eval(), images, embeddings, name)
    _require_gradients(embedder, images, name)


# ---------------------------------------------------------------- images and comparisons


def _patterns(size: int) -> Tensor:
    """(B, 3, size, size) uint8 smooth random patterns."""
    noise = torch.rand(B, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(noise, (size, size), mode="bilinear")
    return (255 * smooth).to(torch.uint8)


@torch.no_grad()
def _embed(embedder: Embedder, images: Tensor) -> Tensor:
    embedding: Tensor = embedder(images.clone())
    return embedding


def _close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= TOLERANCE * one.norm(dim=1).max())


# ---------------------------------------------------------------- assertions


def _require_repeatable(embedder: Embedder, images: Tensor, name: str) -> Tensor:
    """Assert what concerns one batch in evaluation mode; returns its (B, d) embeddings."""
    digest, given = embedder.digest(), images.clone()
    with torch.no_grad():
        first: Tensor = embedder(given)
    assert torch.equal(given, images), f"{name} changes its input; use no in-place operation on the images"
    assert first.isfinite().all(), f"{name} returns NaN or infinity in evaluation mode"
    assert torch.equal(_embed(embedder, images), first), (
        f"{name} returns other embeddings for the same images a second time; draw nothing at random in evaluation mode"
    )
    assert embedder.digest() == digest, (
        f"{name} changes a weight or a buffer in evaluation mode; update them only if self.training"
    )
    rows = {tuple(row.tolist()) for row in first}
    assert len(rows) == B, f"{name} returns the same embedding for different images"
    return first


def _require_independent(embedder: Embedder, images: Tensor, embeddings: Tensor, name: str) -> None:
    """Assert that an embedding depends neither on the rest of the batch nor on the memory format."""
    for some in (torch.arange(B).flip(0), torch.arange(2), torch.tensor([B - 1])):
        assert _close(_embed(embedder, images[some]), embeddings[some]), (
            f"{name} returns other embeddings for the same images in another batch; normalise within an image, or "
            "with statistics that are fixed in evaluation mode"
        )
    assert _close(_embed(embedder, images.to(memory_format=torch.channels_last)), embeddings), (
        f"{name} returns other embeddings for images in the channels-last memory format; use reshape or flatten, "
        "which go by shape, and not the order in memory"
    )


def _require_copies(embedder: Embedder, other: Embedder, images: Tensor, embeddings: Tensor, name: str) -> None:
    """Assert that the state dict is all that decides the embeddings. other: the model of another seed."""
    try:
        copied = copy.deepcopy(embedder)
    except Exception as wrong:  # a module may hold anything
        raise AssertionError(f"{name} cannot be copied by copy.deepcopy: {wrong}") from None
    assert torch.equal(_embed(copied, images), embeddings), f"{name} returns other embeddings when it is copied"
    other.backbone.load_state_dict(embedder.backbone.state_dict())
    assert _close(_embed(other, images), embeddings), (
        f"{name} returns other embeddings when its state dict is loaded into a second model; keep whatever decides "
        "them in parameters and buffers, or make it the same whenever the model is built"
    )


def _require_gradients(embedder: Embedder, images: Tensor, name: str) -> None:
    """Assert that every trainable weight has a finite gradient in training mode, and that the input is unchanged."""
    given = images.clone()
    embedding: Tensor = embedder.train()(given)
    assert torch.equal(given, images), f"{name} changes its input in training mode; use no in-place operation on it"
    weights = {key: p for key, p in embedder.backbone.named_parameters() if p.requires_grad}
    if not weights:
        return
    embedding.float().square().sum().backward()
    idle = [key for key, p in weights.items() if p.grad is None]
    assert not idle, (
        f"{name} has weights without a gradient: {', '.join(idle[:5])}; use them, or call requires_grad_(False)"
    )
    wrong = [key for key, p in weights.items() if p.grad is not None and not p.grad.isfinite().all()]
    assert not wrong, f"{name} has a gradient that is not finite: {', '.join(wrong[:5])}"
