"""Train pipeline/models/networks/digits.safetensors: about four minutes on one core, without labels.

    .venv/bin/python -m benchmarks.train_digits_teacher --seed 0 --out pipeline/models/networks/digits.safetensors

On one machine the same command writes the same bytes: it uses one thread, and all random numbers come from the seed.

The network is trained by contrastive learning (Chen et al. 2020, SimCLR) on the training split of digits, with views
that suit digits: small rotations, shifts, changes of scale and slant, an erased square, noise, and no mirror images.
After a tenth of the epochs, the positive is no longer another view of the same image, but a view of one of its
NEIGHBOURS nearest images in the network's own embedding, which are searched again every few epochs. This idea of
Dwibedi et al. 2021 (NNCLR) brings different ways of writing a digit closer together. There is no projection head: the
loss is computed on the embedding itself, because clusters of the embedding are scored.
"""

import argparse
import math
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from compress_ssl.pipeline.datasets import DATASETS
from compress_ssl.pipeline.models import build
from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.views.augment import ResolvedView
from compress_ssl.pipeline.views.render import render_view

EPOCHS, BATCH = 150, 479  # three steps an epoch
RATE, DECAY, WARMUP = 3e-3, 1e-2, 50  # AdamW; WARMUP in steps, then a cosine to 0
TEMPERATURE = 0.3
WITHOUT_NEIGHBOURS, SEARCH_EVERY, NEIGHBOURS = 0.1, 5, 20  # share of the epochs, epochs between searches, images
TURN, SHIFT, SCALE, SLANT = math.radians(15), 0.15, 0.25, 0.2  # SHIFT in sides, SCALE in natural logarithms
ERASED, NOISE = 5, 0.05  # pixels of a square; standard deviation, pixels being in [0, 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    embedder = build("digits-teacher:pretrained=false").train()
    images = render_plain(embedder.preprocessing.size)
    train(embedder, images, torch.Generator().manual_seed(arguments.seed))
    tensors = {name: tensor.contiguous() for name, tensor in embedder.backbone.state_dict().items()}
    arguments.out.write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
    print(f"{arguments.out}: {arguments.out.stat().st_size} bytes, tensors {embedder.digest()}")


def render_plain(size: int) -> Tensor:
    """View 0 of the training images: (N, 1, size, size) in [0, 1]."""
    digits = DATASETS.build("digits")
    pictures = [torch.from_numpy(digits.load(i)[0]).permute(2, 0, 1) for i in range(len(digits))]
    return (
        torch.stack([render_view(picture, ResolvedView(plain=1.0), size, "bilinear") for picture in pictures])[:, :1]
        / 255
    )


def train(embedder: Embedder, images: Tensor, random: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(embedder.parameters(), lr=RATE, weight_decay=DECAY)
    per_epoch = len(images) // BATCH
    near: Tensor | None = None  # (N, NEIGHBOURS) nearest images, once they are used
    for epoch in range(EPOCHS):
        if epoch >= WITHOUT_NEIGHBOURS * EPOCHS and (near is None or epoch % SEARCH_EVERY == 0):
            near = find_neighbours(embedder, images)
        order = torch.randperm(len(images), generator=random)
        for number, rows in enumerate(order[: per_epoch * BATCH].split(BATCH)):
            step = epoch * per_epoch + number
            rate = RATE * min(1.0, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / (EPOCHS * per_epoch))) / 2
            optimizer.param_groups[0]["lr"] = rate
            pick = torch.randint(NEIGHBOURS, (len(rows),), generator=random)
            others = rows if near is None else near[rows, pick]
            views = torch.cat([augment(images[rows], random), augment(images[others], random)])
            loss = nt_xent(embed(embedder, views))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1} of {EPOCHS}, loss {loss.item():.4f}", flush=True)


def embed(embedder: Embedder, images: Tensor) -> Tensor:
    """(n, 1, S, S) in [0, 1] -> (n, d) unit vectors."""
    preprocessing = embedder.preprocessing
    return F.normalize(embedder((images - preprocessing.mean[0]) / preprocessing.std[0]), dim=1)


def nt_xent(z: Tensor) -> Tensor:
    """NT-Xent (the contrastive loss of SimCLR) of (2n, d) unit vectors, in nats; rows i and i + n are positives."""
    similarity = (z @ z.T / TEMPERATURE).fill_diagonal_(-math.inf)
    return F.cross_entropy(similarity, torch.arange(len(z)).roll(len(z) // 2))


@torch.no_grad()
def find_neighbours(embedder: Embedder, images: Tensor) -> Tensor:
    """(N, NEIGHBOURS) indices of the nearest other images of each image, in the present embedding."""
    embedder.eval()
    z = torch.cat([embed(embedder, part) for part in images.split(512)])
    embedder.train()
    return (z @ z.T).fill_diagonal_(-2.0).topk(NEIGHBOURS).indices


def augment(images: Tensor, random: torch.Generator) -> Tensor:
    """One random view of each image: (n, 1, S, S) in [0, 1] -> the same."""
    n, side = len(images), images.shape[-1]

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=random)

    turn, slant = between(-TURN, TURN), between(-SLANT, SLANT)
    x, y = between(-SCALE, SCALE).exp(), between(-SCALE, SCALE).exp()
    right, down = 2 * between(-SHIFT, SHIFT), 2 * between(-SHIFT, SHIFT)
    rows = [turn.cos() * x, slant - turn.sin() * y, right, turn.sin() * x, turn.cos() * y, down]
    grid = F.affine_grid(torch.stack(rows, 1).view(n, 2, 3), list(images.shape), align_corners=False)
    views = F.grid_sample(images, grid, align_corners=False) * between(0.7, 1.3).view(n, 1, 1, 1)
    position = torch.arange(side)
    rows_off = (position - between(0, side).floor()[:, None]).abs() <= ERASED // 2  # (n, side)
    columns_off = (position - between(0, side).floor()[:, None]).abs() <= ERASED // 2
    off = (rows_off[:, :, None] & columns_off[:, None, :])[:, None] & (between(0, 1) < 0.5).view(n, 1, 1, 1)
    noise = NOISE * torch.randn(views.shape, generator=random)
    return (views.masked_fill(off, 0.0) + noise).clamp(0.0, 1.0)


if __name__ == "__main__":
    main()
