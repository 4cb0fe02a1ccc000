"""Digests of a few rendered views, to detect a machine that renders other pixels.

Decoders and resamplers differ between library versions and processors. A store keeps digests of the views of three
images as the teacher saw them. Before training, verifying or continuing an export the same views are rendered again
and compared.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from compress_ssl.pipeline.datasets.base import Dataset
from compress_ssl.pipeline.datasets.decode import BadImage
from compress_ssl.pipeline.runtime import digests
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.views.augment import ViewSpec, draw_variates
from compress_ssl.pipeline.views.preprocessing import Preprocessing
from compress_ssl.pipeline.views.render import render_views

VIEWS = (0, 1, 2)  # the plain view and two random ones; stores depend on them
NEAR = 32  # rows that are tried until one has a good image


def probe_digests(dataset: Dataset, spec: ViewSpec, preprocessing: Preprocessing) -> dict[str, str]:
    """{row: digest of its probe views at the teacher's size} of the first, the middle and the last image.

    Bad images are replaced by the nearest good one of NEAR rows. The view key of an image is its row number.
    """
    found: dict[str, str] = {}
    rows = range(len(dataset))
    for candidates in (rows[:NEAR], rows[len(rows) // 2 :][:NEAR], rows[::-1][:NEAR]):
        for i in candidates:
            digest = digest_probe_views(dataset, spec, preprocessing, i, i)
            if digest is not None:
                found[str(i)] = digest
                break
    return found


def digest_probe_views(dataset: Dataset, spec: ViewSpec, preprocessing: Preprocessing, i: int, key: int) -> str | None:
    """Digest of the probe views of image i, whose view key is `key`; None for a bad image."""
    try:
        image, _ = dataset.load(i)
    except BadImage:
        return None
    variates = draw_variates(spec.seed, key, np.array(VIEWS, np.uint64))
    size = [(preprocessing.size, preprocessing.interpolation)]
    return digests.digest(render_views(image, spec, variates, VIEWS, size)[0].numpy().tobytes())


def require_same_rendering(
    recorded: dict[str, str],
    dataset: Dataset,
    spec: ViewSpec,
    preprocessing: Preprocessing,
    keys: Sequence[int] | NDArray[np.uint64],
    allow: bool | None,
) -> str:
    """Render the probe views again: "" if the digests are the recorded ones, else a description of the difference.

    recorded: {row: digest} of the store; keys: view keys by row; allow: whether a difference is accepted.
    Raises UserError for a difference that is not accepted: the pixels are no longer those of the stored features.
    allow=None says that the command has no flag to accept it: a store cannot be continued with other pixels.
    """
    different = [
        i
        for i, digest in recorded.items()
        if digest_probe_views(dataset, spec, preprocessing, int(i), int(keys[int(i)])) != digest
    ]
    if not different:
        return ""
    difference = (
        f"{len(different)} of {len(recorded)} probe images do not look as they did to the teacher, "
        f"the first is {dataset.ids[int(different[0])]}"
    )
    if not allow:
        remedy = "export into a new folder" if allow is None else "accept it with --allow-other-pixels"
        raise UserError(
            f"{difference}: the file changed, or Pillow or torchvision render differently here; put the file back, "
            f"install the versions in the store's history.jsonl, or {remedy}"
        )
    return difference
