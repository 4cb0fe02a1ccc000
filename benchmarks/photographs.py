"""Full-size images for the benchmarks that decode."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

IMAGES = 100


def photographs(folder: Path) -> Path:
    """The folder named in COMPRESS_BENCH_IMAGES; without it, noise like photographs, 500 x 375 JPEGs, made here."""
    if given := os.environ.get("COMPRESS_BENCH_IMAGES"):
        return Path(given)
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(IMAGES):
        coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number:04d}.jpg", quality=90)
    return folder
