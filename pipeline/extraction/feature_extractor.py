"""`FeatureExtractor`: a model on one device, applied to batches of images."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.models.precision import autocast

UNPADDED_BATCH = 256
"""Images per forward pass without padding, at most."""

UNPADDED_BYTES = 32_000_000
"""Bytes of uint8 pixels per forward pass without padding: of images of 224 x 224 pixels a batch has 212."""


@dataclass(frozen=True)
class FeatureExtractor:
    """A model on a device: uint8 pixels (B, 3, S, S) -> {output: float32 (B, ...)}. It is frozen if `padded`."""

    embedder: Embedder
    device: torch.device
    precision: str = "fp32"
    """A key of models.precision.PRECISIONS."""

    batch_size: int = 64
    """Images per forward pass."""

    names: Sequence[str] = ("embedding",)
    """The outputs to compute; see Embedder.forward_outputs."""

    padded: bool = True
    """Whether every forward pass has `batch_size` images: a bad image keeps its slot, a smaller batch is padded. So an
    image's feature does not depend on the images beside it, whose number may change the arithmetic of a library.

    If not, a forward pass has the usable images of its batch alone, and the model is left as it is: it may be a student
    in training. The figures of validation and the random views of probes have always been computed so; padding would
    change their last bits."""

    def __post_init__(self) -> None:
        self.embedder.enable_outputs(self.names)
        if self.padded:
            self.embedder.eval().requires_grad_(False).to(self.device).to(memory_format=torch.channels_last)

    @classmethod
    def unpadded(cls, embedder: Embedder, device: torch.device, precision: str = "fp32") -> "FeatureExtractor":
        """An extractor of the embedding that leaves the model as it is. The model must be on the device."""
        size = embedder.preprocessing.size
        batch_size = max(1, min(UNPADDED_BATCH, UNPADDED_BYTES // (3 * size * size)))
        return cls(embedder, device, precision, batch_size, padded=False)

    @property
    def batches_ahead(self) -> int:
        """Batches that may be in progress on the device while the host processes the results of an earlier one."""
        return 1 if self.device.type == "cuda" else 0

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """The model in evaluation mode within the block, and afterwards in the mode that it had."""
        was_training = self.embedder.training
        self.embedder.eval()
        try:
            yield
        finally:
            self.embedder.train(was_training)

    def start(self, pixels: Tensor, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Start a forward pass and return its outputs on the device; a GPU may still be computing them.

        pixels: uint8 (n, 3, S, S), n at most `batch_size`. If `padded`, a smaller batch is filled with black images.
        """
        n = len(pixels)
        if self.padded and n < self.batch_size:
            pixels = torch.cat([pixels, pixels.new_zeros((self.batch_size - n, *pixels.shape[1:]))])
        # what a model keeps of a pass in inference mode cannot be used in training
        without_gradients = torch.inference_mode() if self.padded else torch.no_grad()
        with without_gradients, autocast(self.device, self.precision):
            images = self.embedder.prepare(pixels.to(self.device, non_blocking=True))
            if self.padded:
                images = images.contiguous(memory_format=torch.channels_last)
            outputs = self.embedder.forward_outputs(images, names or self.names)
            return {name: out[:n].float() for name, out in outputs.items()}
