"""Full-size JPEG files for the benchmarks that decode images."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

IMAGES = 100


def prepare_images(folder: Path) -> Path:
    """Return the folder named in COMPRESS_BENCH_IMAGES, or, without it, write IMAGES JPEGs of smooth noise to `folder`.

    The JPEGs have 500 x 375 pixels.
    """
    if existing := os.environ.get("COMPRESS_BENCH_IMAGES"):
        return Path(existing)
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(IMAGES):
        coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number:04d}.jpg", quality=90)
    return folder
