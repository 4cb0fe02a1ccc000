"""Digests of a few rendered views, so that a machine that renders differently is noticed.

Decoders and resamplers differ between versions and processors. The store keeps what some images
looked like to the teacher; whoever trains or verifies looks at the same ones first.
"""

from typing import Any

import numpy as np

from compress_ssl.pipeline.datasets.decode import BadImage
from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.views.augment import ViewSpec, draw_variates
from compress_ssl.pipeline.views.preprocessing import Preprocessing
from compress_ssl.pipeline.views.render import render_views

VIEWS = (0, 1, 2)
NEAR = 32  # rows that are looked at for a good image


def probe_digests(dataset: Any, spec: ViewSpec, preprocessing: Preprocessing) -> dict[str, str]:
    """{row: digest of its probe views at the teacher's size}: of the first, middle and last image, or a good one near.

    Their view keys are their row numbers.
    """
    out: dict[str, str] = {}
    rows = range(len(dataset))
    for near in (rows[:NEAR], rows[len(rows) // 2 :][:NEAR], rows[::-1][:NEAR]):
        for i in near:
            if (seen := view_digest_of(dataset, spec, preprocessing, i, i)) is not None:
                out[str(i)] = seen
                break
    return out


def view_digest_of(dataset: Any, spec: ViewSpec, preprocessing: Preprocessing, i: int, key: int) -> str | None:
    """Digest of image i's probe views; None if it is bad."""
    try:
        image, _ = dataset.load(i)
    except BadImage:
        return None
    variates = draw_variates(spec.seed, key, np.array(VIEWS, np.uint64))
    size = [(preprocessing.size, preprocessing.interpolation)]
    return artifact.digest(render_views(image, spec, variates, VIEWS, size)[0].numpy().tobytes())


def require_same_rendering(
    there: dict[str, str], dataset: Any, spec: ViewSpec, preprocessing: Preprocessing, keys: Any, allow: bool | None
) -> str:
    """Look at the probed images again: "" if they look the same, else what differs if `allow` is set.

    Raises UserError if they differ: a student would be taught features of other pixels. `allow` is None
    where no flag could allow it: half a store of other pixels is of no use.
    """
    unlike = [
        i
        for i, seen in there.items()
        if view_digest_of(dataset, spec, preprocessing, int(i), int(keys[int(i)])) != seen
    ]
    if not unlike:
        return ""
    first = dataset.ids[int(unlike[0])]
    words = f"{len(unlike)} of {len(there)} probe images do not look as they did to the teacher, the first is {first}"
    if not allow:
        way_out = "export into a new folder" if allow is None else "accept it with --allow-other-pixels"
        raise UserError(
            f"{words}: the file changed, or Pillow or torchvision render differently here; put the file back, install "
            f"the versions in the store's history.jsonl, or {way_out}"
        )
    return words
