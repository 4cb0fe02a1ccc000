"""Peak memory in MB of an export of N images, against an export of 8 N images.

Both have the same model, views, batch size and shard size, and each runs in a process of its own.
"""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

IMAGES, FACTOR, VIEWS, WIDTH, SIDE = 1000, 8, 8, 1024, 16


def measure() -> dict[str, object]:
    """Peaks of the exporting process and of its largest loader process, and the size of all features of 8 N images."""
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        random = np.random.default_rng(0)
        for number in range(IMAGES * FACTOR):
            pixels = random.integers(0, 256, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / f"{number:05d}.png", compress_level=1)
        small, large = (export_in_process(images, Path(folder) / str(n), n) for n in (IMAGES, IMAGES * FACTOR))
    return {
        "images": [IMAGES, IMAGES * FACTOR],
        "MB exporting": [small[0], large[0]],
        "MB of a loader process": [small[1], large[1]],
        "ratio": round(large[0] / small[0], 3),
        "MB of all features as float32": round(IMAGES * FACTOR * VIEWS * WIDTH * 4 / 1e6),
    }


def export_in_process(images: Path, out: Path, limit: int) -> tuple[float, float]:
    """Export `limit` images to `out` in a new process.

    Returns its peak MB and the peak MB of the largest process that it started.
    """
    command = [sys.executable, "-m", "benchmarks.memory", str(images), str(out), str(limit)]
    completed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    own, children = completed.stdout.split()[-2:]
    return float(own), float(children)


def export(images: str, out: str, limit: str) -> None:
    """Run one export in this process, then print the two peaks in MB."""
    from compress_ssl.stages import export_teacher

    teacher = f"convnet:channels=8+{WIDTH},pretrained=false"
    config = export_teacher.Config(
        data=images, teacher=teacher, out=out, limit=int(limit), views=VIEWS, image_size=SIDE, shard_size=256,
        workers=1, device="cpu",
    )  # fmt: skip
    export_teacher.run(config)
    for processes in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        print(round(resource.getrusage(processes).ru_maxrss / 1024, 1))


if __name__ == "__main__":
    export(*sys.argv[1:])
