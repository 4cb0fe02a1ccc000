"""Train pipeline/models/networks/digits.safetensors: about four minutes on one core, without labels.

    .venv/bin/python -m benchmarks.train_digits_teacher --seed 0 --out pipeline/models/networks/digits.safetensors

On one machine the same command gives the same bytes: one thread, every random number from the seed.

Contrastive learning (Chen et al. 2020) on the training split of digits with views that suit them:
small rotations, shifts, changes of scale and slant, an erased square, noise, and no mirror images.
After a tenth of the epochs the positive is not another view of the same image but a view of one of
its NEIGHBOURS nearest images in the network's own embedding, found anew every few epochs, an idea
of Dwibedi et al. 2021: it draws the ways of writing one digit together. There is no projection
head; the contrast is in the embedding itself, since clusters of the embedding are what is scored.
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
from compress_ssl.pipeline.views.augment import ResolvedView
from compress_ssl.pipeline.views.render import render_view

EPOCHS, BATCH = 150, 479  # three steps an epoch
RATE, DECAY, WARMUP = 3e-3, 1e-2, 50  # AdamW; WARMUP in steps, then a cosine to 0
TEMPERATURE = 0.3
ALONE, RENEW, NEIGHBOURS = 0.1, 5, 20  # share of the epochs without neighbours, epochs between searches
TURN, SHIFT, SCALE, SLANT = math.radians(15), 0.15, 0.25, 0.2  # SHIFT in sides, SCALE in natural logarithms
ERASED, NOISE = 5, 0.05  # pixels of a square; standard deviation, pixels being in [0, 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(asked.seed)
    embedder = build("digits-teacher:pretrained=false").train()
    images = plain(embedder.preprocessing.size)
    train(embedder, images, torch.Generator().manual_seed(asked.seed))
    tensors = {name: tensor.contiguous() for name, tensor in embedder.backbone.state_dict().items()}
    asked.out.write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
    print(f"{asked.out}: {asked.out.stat().st_size} bytes, tensors {embedder.digest()}")


def plain(size: int) -> Tensor:
    """View 0 of the training images: (N, 1, size, size) in [0, 1]."""
    digits = DATASETS.build("digits")
    pictures = [torch.from_numpy(digits.load(i)[0]).permute(2, 0, 1) for i in range(len(digits))]
    return (
        torch.stack([render_view(picture, ResolvedView(plain=1.0), size, "bilinear") for picture in pictures])[:, :1]
        / 255
    )


def train(embedder: torch.nn.Module, images: Tensor, random: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(embedder.parameters(), lr=RATE, weight_decay=DECAY)
    per_epoch, near = len(images) // BATCH, None
    for epoch in range(EPOCHS):
        if epoch >= ALONE * EPOCHS and (near is None or epoch % RENEW == 0):
            near = neighbours(embedder, images)
        order = torch.randperm(len(images), generator=random)
        for number, rows in enumerate(order[: per_epoch * BATCH].split(BATCH)):
            step = epoch * per_epoch + number
            rate = RATE * min(1.0, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / (EPOCHS * per_epoch))) / 2
            optimizer.param_groups[0]["lr"] = rate
            pick = torch.randint(NEIGHBOURS, (len(rows),), generator=random)
            others = rows if near is None else near[rows, pick]
            views = torch.cat([augment(images[rows], random), augment(images[others], random)])
            loss = contrast(embed(embedder, views))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1} of {EPOCHS}, loss {loss.item():.4f}", flush=True)


def embed(embedder: torch.nn.Module, images: Tensor) -> Tensor:
    """(n, 1, S, S) in [0, 1] -> (n, d) unit vectors."""
    seen = embedder.preprocessing
    return F.normalize(embedder((images - seen.mean[0]) / seen.std[0]), dim=1)


def contrast(z: Tensor) -> Tensor:
    """NT-Xent of (2n, d) unit vectors, rows i and i + n being positives, in nats."""
    similarity = (z @ z.T / TEMPERATURE).fill_diagonal_(-math.inf)
    return F.cross_entropy(similarity, torch.arange(len(z)).roll(len(z) // 2))


@torch.no_grad()
def neighbours(embedder: torch.nn.Module, images: Tensor) -> Tensor:
    """(N, NEIGHBOURS): the nearest other images of each in the embedding as it is now."""
    embedder.eval()
    z = torch.cat([embed(embedder, part) for part in images.split(512)])
    embedder.train()
    return (z @ z.T).fill_diagonal_(-2.0).topk(NEIGHBOURS).indices


def augment(images: Tensor, random: torch.Generator) -> Tensor:
    """One random view of each of (n, 1, S, S), in [0, 1]."""
    n, side = len(images), images.shape[-1]

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=random)

    turn, slant = between(-TURN, TURN), between(-SLANT, SLANT)
    x, y = between(-SCALE, SCALE).exp(), between(-SCALE, SCALE).exp()
    right, down = 2 * between(-SHIFT, SHIFT), 2 * between(-SHIFT, SHIFT)
    rows = [turn.cos() * x, slant - turn.sin() * y, right, turn.sin() * x, turn.cos() * y, down]
    grid = F.affine_grid(torch.stack(rows, 1).view(n, 2, 3), list(images.shape), align_corners=False)
    seen = F.grid_sample(images, grid, align_corners=False) * between(0.7, 1.3).view(n, 1, 1, 1)
    place = torch.arange(side)
    rows_off = (place - between(0, side).floor()[:, None]).abs() <= ERASED // 2  # (n, side)
    columns_off = (place - between(0, side).floor()[:, None]).abs() <= ERASED // 2
    off = (rows_off[:, :, None] & columns_off[:, None, :])[:, None] & (between(0, 1) < 0.5).view(n, 1, 1, 1)
    noise = NOISE * torch.randn(seen.shape, generator=random)
    return (seen.masked_fill(off, 0.0) + noise).clamp(0.0, 1.0)


if __name__ == "__main__":
    main()
