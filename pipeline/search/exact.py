"""Exact nearest neighbours and k-means by FAISS, on a GPU when it sees one.

Everything is float32 and exact. On a CPU the same call gives the same bytes for a fixed number of
threads and of queries; another machine, thread count or batch of queries may round the last bit
differently (FAISS computes L2 as |q|^2 + |x|^2 - 2 q.x above 20 queries and by the definition
below). On a GPU scores differ from the CPU's by float32 rounding, unless float16 is asked for.
Inside: Q queries, N keys, K neighbours or clusters, D dims.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np

from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.storage import Folder

Metric = Literal["l2", "dot", "cosine"]

BLOCK_BYTES = 1 << 30  # keys in the index at once: bounds the copy FAISS makes, and what a GPU must hold
GPU_MOST = 2048  # neighbours per query, FAISS's own limit on a GPU


def normalize(features: np.ndarray) -> np.ndarray:
    """(N, D) rows divided by their L2 norm, float32, a new array; a row of zeros stays zeros.

    The CompRess code divides by the bare norm, so there a dead row becomes NaN and matches nothing;
    here it is equally far from everything. Raises UserError for a row with NaN or infinity.
    """
    out = np.array(features, dtype=np.float32, order="C", ndmin=2)
    rows = max(1, (64 << 20) // (8 * max(1, out.shape[1])))
    for start in range(0, len(out), rows):
        block = out[start : start + rows]
        norm = np.sqrt(np.square(block, dtype=np.float64).sum(axis=1))  # float64: squares of 1e20 fit
        if not np.isfinite(norm).all():
            bad = start + int(np.flatnonzero(~np.isfinite(norm))[0])
            raise UserError(
                f"feature row {bad} of {len(out)} holds NaN or infinity; the model that made it has diverged "
                "or overflowed: evaluate an earlier checkpoint, or embed with --precision fp32"
            )
        norm[norm == 0] = 1
        np.divide(block, norm[:, None], out=block, casting="unsafe")
    return out


def search(
    queries: np.ndarray, keys: np.ndarray, k: int, metric: Metric = "l2", float16: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest keys of each query: (scores (Q, k) float32, ids (Q, k) int64), nearest first.

    Scores: "l2" the squared Euclidean distance, ascending; "dot" the inner product and "cosine" the
    inner product of normalised rows, descending. Equal scores come in order of id. `float16` halves
    the keys on a GPU, as the CompRess code does; it changes nothing on a CPU.
    Raises UserError if there are fewer than k keys.
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
        index = build_index(keys.shape[1], metric, float16, gpu=k <= GPU_MOST)
        index.add(block)
        near, place = index.search(queries, min(k, len(block)))
        scores, ids = np.hstack([scores, near]), np.hstack([ids, place + start])
        order = np.lexsort((ids, scores if metric == "l2" else -scores), axis=-1)[:, :k]
        scores, ids = np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)
    return scores, ids


def write_index(path: Path, features: np.ndarray) -> None:
    """Write (N, D) features as a FAISS IndexFlatL2, whole or not at all; `faiss.read_index` opens it."""
    import faiss

    index = faiss.IndexFlatL2(features.shape[1])
    index.add(np.ascontiguousarray(features, dtype=np.float32))
    Folder(path.parent).put(path.name, faiss.serialize_index(index).tobytes())


def build_index(dims: int, metric: Metric, float16: bool, gpu: bool = True) -> Any:
    """An empty exact index, on the first GPU if FAISS sees one."""
    import faiss

    index = faiss.IndexFlatL2(dims) if metric == "l2" else faiss.IndexFlatIP(dims)
    if not gpu or not faiss.get_num_gpus():
        return index
    options = faiss.GpuClonerOptions()
    options.useFloat16 = float16
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index, options)  # the index shares the resources
