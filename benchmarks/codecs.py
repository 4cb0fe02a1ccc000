"""Size, speed and error of each codec, against the exact float32 features of a store.

The features are the embeddings of all views of the store. Quantisers are trained on its even rows, and everything is
measured on its odd rows. The environment variable COMPRESS_BENCH_STORE names the store, which `export-teacher --codec
float32` or an evaluation (in features/val) wrote. Without it, the built-in digits are exported with the built-in
teacher.
"""

import functools
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import Zstd

from compress_ssl.pipeline.datasets.decode import GOOD
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.search.exact import normalize
from compress_ssl.pipeline.store.codecs import Codec, Trained, build_codec
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.layout import CHUNK_ROWS, ZSTD_LEVEL

CODECS = ("float32", "float32+zstd", "float16", "float16+zstd", "int8", "int8+zstd")
BYTES = (16, 32, 64, 128, 256)  # per vector, for product quantisation
QUERIES, ANCHORS, TEMPERATURE, NEIGHBOURS = 1000, 4000, 0.04, 10


def measure() -> dict[str, Any]:
    """One row per codec, a description of the features, and their share of zeros."""
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(Folder(os.environ.get("COMPRESS_BENCH_STORE") or _export_digits(Path(folder) / "store")))
        good = store.table("status") == GOOD
        sample, held_out = _split_rows(store, good)
        queries, anchors = held_out[:QUERIES], held_out[QUERIES : QUERIES + ANCHORS]
        width = held_out.shape[1]
        names = [*CODECS, *(f"pq:{m}" for m in BYTES if m <= width), f"pq:{min(64, width)}+zstd"]
        rows = [_measure_codec(name, sample, queries, anchors) for name in names]
    about = store.about.teacher or "the model of an evaluation"
    zeros = round(float((held_out == 0).mean()), 3)
    return {"features": f"{about}, {len(held_out)} x {width}", "zeros": zeros, "rows": rows}


def _split_rows(store: FeatureStore, good: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(features of the even rows in all views, features of the odd rows in all views, shuffled to mix the classes)"""
    features = np.stack([store.read("embedding", v)[good] for v in range(store.views)], 1)
    odd = features[1::2].reshape(-1, features.shape[-1])
    return features[::2].reshape(-1, features.shape[-1]), odd[np.random.default_rng(0).permutation(len(odd))]


def _measure_codec(name: str, sample: np.ndarray, queries: np.ndarray, anchors: np.ndarray) -> dict[str, Any]:
    """Size in bytes, speed in MB of float32 features per second of processor time, and errors of one codec."""
    codec, training_seconds = build_codec(name), 0.0
    if isinstance(codec, Trained):
        codebook, training_seconds = _timed(functools.partial(codec.train, sample))
        codec = build_codec(name, lambda: codebook)
    (encoded, compressed), encode_seconds = _timed(lambda: _encode(codec, anchors))
    decoded_anchors, decode_seconds = _timed(lambda: _decode(codec, encoded, compressed))
    decoded_queries = codec.decode(*codec.encode(queries))
    exact = [normalize(x) for x in (queries, anchors)]
    lossy = [normalize(x) for x in (decoded_queries, decoded_anchors)]
    if codec.compressor:
        size = sum(map(len, compressed)) / len(anchors)
    else:
        size = codec.size(anchors.shape[1:]) - 4 * codec.scaled  # without the scale, which is added below
    return {
        "codec": name,
        "bytes per view": round(size + 4 * codec.scaled, 1),
        "training seconds": round(training_seconds, 1),
        "encode MB/s": round(anchors.nbytes / 1e6 / encode_seconds),
        "decode MB/s": round(anchors.nbytes / 1e6 / decode_seconds),
        "cosine": round(float((exact[0] * lossy[0]).sum(1).mean()), 5),
        "KL": float(f"{_divergence(exact, lossy):.2g}"),
        "top-10 overlap %": round(100 * _overlap(exact, lossy), 1),
    }


def _encode(codec: Codec, features: np.ndarray) -> tuple[Any, list[bytes]]:
    """((stored values, scales), compressed chunks of CHUNK_ROWS rows, or [] if the codec does not compress)"""
    stored, scale = codec.encode(features)
    if not codec.compressor:
        return (stored, scale), []
    chunks = [stored[first : first + CHUNK_ROWS] for first in range(0, len(stored), CHUNK_ROWS)]
    return (stored, scale), [Zstd(ZSTD_LEVEL).encode(chunk) for chunk in chunks]


def _decode(codec: Codec, encoded: Any, compressed: list[bytes]) -> np.ndarray:
    """Features (n, D) from what `_encode` returned."""
    stored, scale = encoded
    if compressed:
        data = b"".join(Zstd().decode(chunk) for chunk in compressed)
        stored = np.frombuffer(data, stored.dtype).reshape(stored.shape)
    return codec.decode(stored, scale)


def _divergence(exact: list[np.ndarray], lossy: list[np.ndarray]) -> float:
    """Mean KL(exact || lossy) in nats of the queries' softmax over the anchors."""
    logs = []
    for queries, anchors in (exact, lossy):
        logits = (queries @ anchors.T).astype(np.float64) / TEMPERATURE
        logits -= logits.max(1, keepdims=True)
        logs.append(logits - np.log(np.exp(logits).sum(1, keepdims=True)))
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(1).mean())


def _overlap(exact: list[np.ndarray], lossy: list[np.ndarray]) -> float:
    """Share of the ten nearest anchors that stay among the ten nearest."""
    near = [np.argpartition(-(q @ a.T), NEIGHBOURS, 1)[:, :NEIGHBOURS] for q, a in (exact, lossy)]
    return float(np.mean([len(set(a) & set(b)) / NEIGHBOURS for a, b in zip(*near, strict=True)]))


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """(the result of a call, its seconds of processor time)"""
    began = time.process_time()
    result = call()
    return result, time.process_time() - began


def _export_digits(out: Path) -> Path:
    """Export the built-in digits as float32 and return the store."""
    from compress_ssl.stages import export_teacher

    export_teacher.run(
        export_teacher.Config(
            data="digits", teacher="digits-teacher", out=str(out), views=4, codec="float32", device="cpu"
        )
    )
    return out
