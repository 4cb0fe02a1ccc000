"""Exact nearest-neighbour search by FAISS, on the first GPU if FAISS finds one.

All arithmetic is float32 and the search is exact. On a CPU the same call gives the same bytes for a fixed number
of threads and of queries. Another machine, thread count or number of queries may round the last bit differently,
because FAISS computes L2 as |q|^2 + |x|^2 - 2 q.x for more than 20 queries and by the definition for fewer. Scores
of a GPU differ from those of the CPU by float32 rounding, and by more if float16 is asked for.

Shapes in this file: Q queries, N keys, k neighbours per query, D dims.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.storage import Folder

if TYPE_CHECKING:
    import faiss

Metric = Literal["l2", "dot", "cosine"]

BLOCK_BYTES = 1 << 30  # 1 GiB: keys in one index. Bounds the copy that FAISS makes and the memory needed on a GPU
MAX_GPU_NEIGHBOURS = 2048  # k: FAISS's own limit on a GPU; a larger k is searched on the CPU
NORMALIZE_BYTES = 64 << 20  # 64 MiB: float64 squares held at once by `normalize`


def normalize(features: np.ndarray) -> np.ndarray:
    """(N, D) rows divided by their L2 norm, float32, as a new array; a row of zeros stays zeros.

    The CompRess code divides by the bare norm, so there a row of zeros becomes NaN and matches nothing; here such a
    row is equally far from every normalised row. Raises UserError for a row with NaN or infinity.
    """
    out = np.array(features, dtype=np.float32, order="C", ndmin=2)
    rows = max(1, NORMALIZE_BYTES // (8 * max(1, out.shape[1])))
    for start in range(0, len(out), rows):
        block = out[start : start + rows]
        norm = np.sqrt(np.square(block, dtype=np.float64).sum(axis=1))  # in float64 the square of 1e20 is finite
        if not np.isfinite(norm).all():
            bad = start + int(np.flatnonzero(~np.isfinite(norm))[0])
            raise UserError(
                f"feature row {bad} of {len(out)} holds NaN or infinity and cannot be compared; if the model diverged, "
                "evaluate an earlier checkpoint; if half precision overflowed, embed with --precision fp32"
            )
        norm[norm == 0] = 1
        np.divide(block, norm[:, None], out=block, casting="unsafe")
    return out


def search(
    queries: np.ndarray, keys: np.ndarray, k: int, metric: Metric = "l2", float16: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of the keys (N, D) for each of the queries (Q, D), nearest first.

    Returns (scores (Q, k) float32, ids (Q, k) int64). For the metric "l2" a score is the squared Euclidean distance
    and ascends; for "dot" it is the inner product and for "cosine" the inner product of normalised rows, and both
    descend. Keys of equal score come in ascending order of id. `float16` stores the keys on a GPU in half precision,
    as the CompRess code does; on a CPU it changes nothing.

    Raises UserError if there are fewer than k keys, and with "cosine" for a row with NaN or infinity.
    """
    if not 1 <= k <= len(keys):
        raise UserError(f"{k} nearest neighbours were asked for among {len(keys)} images; ask for at most {len(keys)}")
    if metric == "cosine":
        queries, keys = normalize(queries), normalize(keys)
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    rows = max(1, BLOCK_BYTES // (4 * keys.shape[1]))
    scores, ids = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for start in range(0, len(keys), rows):
        block = np.ascontiguousarray(keys[start : start + rows], dtype=np.float32)
        index = build_index(keys.shape[1], metric, float16, gpu=k <= MAX_GPU_NEIGHBOURS)
        index.add(block)
        block_scores, block_ids = index.search(queries, min(k, len(block)))
        scores, ids = np.hstack([scores, block_scores]), np.hstack([ids, block_ids + start])
        order = np.lexsort((ids, scores if metric == "l2" else -scores), axis=-1)[:, :k]
        scores, ids = np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)
    return scores, ids


def write_index(path: Path, features: np.ndarray) -> None:
    """Write (N, D) features as a FAISS IndexFlatL2 that `faiss.read_index` opens.

    The file is replaced whole: a write that fails leaves the earlier file as it was.
    """
    import faiss

    index = faiss.IndexFlatL2(features.shape[1])
    index.add(np.ascontiguousarray(features, dtype=np.float32))
    Folder(path.parent).put(path.name, faiss.serialize_index(index).tobytes())


def build_index(dims: int, metric: Metric, float16: bool, gpu: bool = True) -> "faiss.Index":
    """An empty exact index for vectors of `dims` dims; on the first GPU if `gpu` is true and FAISS finds one."""
    import faiss

    index = faiss.IndexFlatL2(dims) if metric == "l2" else faiss.IndexFlatIP(dims)
    if not gpu or not faiss.get_num_gpus():
        return index
    options = faiss.GpuClonerOptions()
    options.useFloat16 = float16
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index, options)  # the index owns the resources
