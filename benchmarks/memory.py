"""Peak memory of an export of N images and of 8 N: same model, views, batch and shards, each in its own process."""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

IMAGES, TIMES, VIEWS, WIDTH, SIDE = 1000, 8, 8, 1024, 16


def measure() -> dict[str, object]:
    """MB of the exporting process and of its largest loader process; what 8 N images' features would weigh."""
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        random = np.random.default_rng(0)
        for number in range(IMAGES * TIMES):
            pixels = random.integers(0, 256, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / f"{number:05d}.png", compress_level=1)
        small, large = (peak(images, Path(folder) / str(n), n) for n in (IMAGES, IMAGES * TIMES))
    return {
        "images": [IMAGES, IMAGES * TIMES],
        "MB exporting": [small[0], large[0]],
        "MB of a loader process": [small[1], large[1]],
        "ratio": round(large[0] / small[0], 3),
        "MB of all features as float32": round(IMAGES * TIMES * VIEWS * WIDTH * 4 / 1e6),
    }


def peak(images: Path, out: Path, limit: int) -> tuple[float, float]:
    """(MB of an export's own process, MB of the largest process it started)"""
    command = [sys.executable, "-m", "benchmarks.memory", str(images), str(out), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    own, children = done.stdout.split()[-2:]
    return float(own), float(children)


def export(images: str, out: str, limit: str) -> None:
    """One export; prints the two peaks."""
    from compress_ssl.stages import export_teacher

    teacher = f"convnet:channels=8+{WIDTH},pretrained=false"
    config = export_teacher.Config(
        data=images, teacher=teacher, out=Path(out), limit=int(limit), views=VIEWS, image_size=SIDE, shard_size=256,
        workers=1, device="cpu",
    )  # fmt: skip
    export_teacher.run(config)
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        print(round(resource.getrusage(who).ru_maxrss / 1024, 1))


if __name__ == "__main__":
    export(*sys.argv[1:])
