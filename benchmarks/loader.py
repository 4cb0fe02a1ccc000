"""Images decoded and views rendered per second on one core, against views that the teacher embeds there.

The first two limit the speed of a loader process. Seconds are processor time in one thread, so that other work on the
machine has little influence.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.export import BATCH, SIZE, TEACHER, VIEWS
from benchmarks.photographs import prepare_images
from compress_ssl.pipeline.datasets import DATASETS
from compress_ssl.pipeline.extraction.feature_extractor import FeatureExtractor
from compress_ssl.pipeline.models import build
from compress_ssl.pipeline.views.augment import ViewSpec, draw_variates
from compress_ssl.pipeline.views.policies import Policy
from compress_ssl.pipeline.views.render import render_views

IMAGES = 24
POLICIES: tuple[Policy, ...] = ("crop-flip", "moco-v2", "dino")


def measure() -> dict[str, Any]:
    """Rates per core and second: images decoded, views rendered by policy, views embedded.

    The last ratio is the time that a loader needs for a view over the time of the forward pass of a view.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            dataset = DATASETS.build(str(prepare_images(Path(folder) / "images"))).subset(IMAGES)
            decode = _seconds(lambda: [dataset.load(i) for i in range(len(dataset))]) / len(dataset)
            images = [dataset.load(i)[0] for i in range(len(dataset))]
        render = {policy: _render(images, policy) for policy in POLICIES}
        embed = _embed()
    finally:
        torch.set_num_threads(threads)
    load = decode / VIEWS + render["crop-flip"]
    pixels = np.mean([image.shape[0] * image.shape[1] for image in images])
    return {
        "images": f"{len(images)}, {pixels / 1e6:.2f} megapixels on average",
        "decode images/s per core": round(1 / decode, 1),
        f"render views/s per core at {SIZE}": {policy: round(1 / s, 1) for policy, s in render.items()},
        f"views/s of one loader process, crop-flip, {VIEWS} views": round(1 / load, 1),
        f"forward views/s per core, {TEACHER}": round(1 / embed, 1),
        "loader / forward, seconds of processor": round(load / embed, 4),
    }


def _render(images: list[np.ndarray], policy: Policy) -> float:
    """Seconds per rendered view."""
    spec, views = ViewSpec(policy, 0, 0.875), np.arange(VIEWS)
    variates = draw_variates(0, np.arange(len(images))[:, None], np.tile(views, (len(images), 1)))
    sizes = [(SIZE, "bilinear")]
    return _seconds(
        lambda: [render_views(image, spec, u, views.tolist(), sizes) for image, u in zip(images, variates, strict=True)]
    ) / (len(images) * VIEWS)


def _embed() -> float:
    """Seconds per view of the teacher's forward pass."""
    forward = FeatureExtractor(build(TEACHER, image_size=SIZE), torch.device("cpu"), batch_size=BATCH)
    pixels = torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
    return _seconds(lambda: forward.start(pixels)) / BATCH


def _seconds(call: Callable[[], object], runs: int = 3) -> float:
    """Processor seconds: the minimum over several runs, after a warm-up run."""
    call()
    seconds = []
    for _ in range(runs):
        began = time.process_time()
        call()
        seconds.append(time.process_time() - began)
    return min(seconds)
