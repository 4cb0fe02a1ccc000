"""What each codec costs and loses, on real features: the embeddings of a float32 store, all its views, even rows to
train on and odd rows to measure on.

COMPRESS_BENCH_STORE names the store: what `export-teacher --codec float32` or an evaluation (features/val) left.
Without it, the embedded digits go through the embedded digits teacher.
"""

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
BYTES = (16, 32, 64, 128, 256)  # of product quantisation
QUERIES, ANCHORS, TEMPERATURE, NEIGHBOURS = 1000, 4000, 0.04, 10


def measure() -> dict[str, Any]:
    """A row per codec, and what was measured on."""
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(Folder(os.environ.get("COMPRESS_BENCH_STORE") or _digits(Path(folder) / "store")))
        good = store.table("status") == GOOD
        sample, held = _halves(store, good)
        queries, anchors = held[:QUERIES], held[QUERIES : QUERIES + ANCHORS]
        width = held.shape[1]
        names = [*CODECS, *(f"pq:{m}" for m in BYTES if m <= width), f"pq:{min(64, width)}+zstd"]
        rows = [_row(name, sample, queries, anchors) for name in names]
    about = store.about.get("teacher", "the model of an evaluation")
    return {"features": f"{about}, {len(held)} x {width}", "zeros": round(float((held == 0).mean()), 3), "rows": rows}


def _halves(store: FeatureStore, good: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(features of even rows, all views; of odd rows, in an order that mixes classes)."""
    features = np.stack([store.read("embedding", v)[good] for v in range(store.views)], 1)
    odd = features[1::2].reshape(-1, features.shape[-1])
    return features[::2].reshape(-1, features.shape[-1]), odd[np.random.default_rng(0).permutation(len(odd))]


def _row(name: str, sample: np.ndarray, queries: np.ndarray, anchors: np.ndarray) -> dict[str, Any]:
    kind, trained = build_codec(name), 0.0
    if isinstance(kind, Trained):
        book, trained = _timed(lambda: kind.train(sample))
        kind = build_codec(name, lambda: book)
    (coded, packed), encode = _timed(lambda: _encode(kind, anchors))
    back, decode = _timed(lambda: _decode(kind, coded, packed))
    seen = kind.decode(*kind.encode(queries))
    exact = [normalize(x) for x in (queries, anchors)]
    lossy = [normalize(x) for x in (seen, back)]
    size = sum(map(len, packed)) / len(anchors) if kind.compressor else kind.size(anchors.shape[1:]) - 4 * kind.scaled
    return {
        "codec": name,
        "bytes per view": round(size + 4 * kind.scaled, 1),
        "training seconds": round(trained, 1),
        "encode MB/s": round(anchors.nbytes / 1e6 / encode),
        "decode MB/s": round(anchors.nbytes / 1e6 / decode),
        "cosine": round(float((exact[0] * lossy[0]).sum(1).mean()), 5),
        "KL": float(f"{_divergence(exact, lossy):.2g}"),
        "top-10 overlap %": round(100 * _overlap(exact, lossy), 1),
    }


def _encode(kind: Codec, features: np.ndarray) -> tuple[Any, list[bytes]]:
    """What the codec makes, and what is on disk of it where it is compressed: a chunk of rows at a time."""
    stored, scale = kind.encode(features)
    cut = range(0, len(stored), CHUNK_ROWS)
    packed = [Zstd(ZSTD_LEVEL).encode(stored[a : a + CHUNK_ROWS]) for a in cut] if kind.compressor else []
    return (stored, scale), packed


def _decode(kind: Codec, coded: Any, packed: list[bytes]) -> np.ndarray:
    stored, scale = coded
    if packed:
        stored = np.frombuffer(b"".join(Zstd().decode(chunk) for chunk in packed), stored.dtype).reshape(stored.shape)
    return kind.decode(stored, scale)


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


def _timed(act: Callable[[], Any]) -> tuple[Any, float]:
    """(result, seconds of processor)"""
    began = time.process_time()
    out = act()
    return out, time.process_time() - began


def _digits(out: Path) -> Path:
    from compress_ssl.stages import export_teacher

    how = {"data": "digits", "teacher": "digits-teacher", "views": 4, "codec": "float32", "device": "cpu"}
    export_teacher.run(export_teacher.Config(out=out, **how))  # type: ignore[arg-type]
    return out
