"""Search and k-means are compared with slow, obvious versions of themselves."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.search import exact, kmeans

ROOT = Path(__file__).parents[1]


def brute_force(queries: np.ndarray, keys: np.ndarray, k: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Every score by its definition in float64, sorted by (score, id)."""
    q, x = queries.astype(np.float64), keys.astype(np.float64)
    if metric == "cosine":
        q, x = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (q, x))
    scores = ((q[:, None] - x[None]) ** 2).sum(axis=2) if metric == "l2" else q @ x.T
    order = np.argsort(scores if metric == "l2" else -scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


def random(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal float32 numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("metric", ["l2", "dot", "cosine"])
@pytest.mark.parametrize("queries", [3, 50])
def test_search_finds_what_brute_force_finds(metric: exact.Metric, queries: int) -> None:
    q, x = random(queries, 12, seed=1), random(200, 12, seed=2)
    scores, ids = exact.search(q, x, 7, metric)
    expected, order = brute_force(q, x, 7, metric)
    assert ids.dtype == np.int64 and scores.dtype == np.float32
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**32 - 1), st.data())
def test_search_is_exact_for_any_shape(q: int, n: int, d: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    draw = np.random.default_rng(seed)
    queries, keys = (
        draw.integers(-3, 4, (m, d)).astype(np.float32) for m in (q, n)
    )  # whole numbers, so that float32 does not round
    scores, ids = exact.search(queries, keys, k, "l2")
    expected, order = brute_force(queries, keys, k, "l2")
    np.testing.assert_array_equal(scores, expected)
    np.testing.assert_array_equal(ids, order)


@pytest.mark.parametrize("metric", ["l2", "dot", "cosine"])
def test_keys_in_several_blocks_give_the_same_neighbours(metric: exact.Metric, monkeypatch: pytest.MonkeyPatch) -> None:
    q, x = random(25, 8, seed=3), random(101, 8, seed=4)
    scores, ids = exact.search(q, x, 20, metric)
    monkeypatch.setattr(exact, "BLOCK_BYTES", 4 * 8 * 7)  # 7 keys, fewer than k
    again, same = exact.search(q, x, 20, metric)
    np.testing.assert_array_equal(same, ids)
    np.testing.assert_allclose(again, scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("metric", ["l2", "dot", "cosine"])
@pytest.mark.parametrize("queries", [2, 40])
@pytest.mark.parametrize("block", [1 << 30, 4 * 4 * 11])
def test_equal_scores_come_in_order_of_id(
    metric: exact.Metric, queries: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "BLOCK_BYTES", block)
    ids = exact.search(np.ones((queries, 4)), np.ones((60, 4)), 9, metric)[1]
    np.testing.assert_array_equal(ids, np.tile(np.arange(9), (queries, 1)))


def test_more_neighbours_than_keys_are_refused_with_both_numbers() -> None:
    with pytest.raises(UserError, match="5 nearest neighbours were asked for among 4 images"):
        exact.search(random(2, 3), random(4, 3), 5)


def test_normalize_returns_unit_rows_and_changes_neither_its_input_nor_rows_of_zeros() -> None:
    features = random(5, 3) * np.array([[1], [1e-15], [1e25], [0], [1]], np.float32)
    before = features.copy()
    unit = exact.normalize(features)
    np.testing.assert_array_equal(features, before)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), [1, 1, 1, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(unit[0], before[0] / np.linalg.norm(before[0]), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_feature_that_is_not_finite_is_refused_with_its_row_number(bad: float) -> None:
    features = random(9, 3)
    features[6, 1] = bad
    with pytest.raises(UserError, match="feature row 6 of 9"):
        exact.normalize(features)


def test_kmeans_ends_where_every_centroid_is_the_mean_of_its_nearest_rows() -> None:
    centres = 10 * random(5, 6, seed=7)
    features = np.repeat(centres, 40, axis=0) + random(200, 6, seed=8)
    centroids, assignment = kmeans.kmeans(features, 5, iterations=30)
    distance = ((features[:, None] - centroids[None]) ** 2).sum(axis=2)
    np.testing.assert_array_equal(assignment, distance.argmin(axis=1))
    for c in range(5):
        np.testing.assert_allclose(centroids[c], features[assignment == c].mean(axis=0), rtol=1e-4, atol=1e-4)


def test_kmeans_uses_every_row_even_with_thousands_per_cluster() -> None:
    features = random(3000, 4)  # by default FAISS would draw 256 of them at random
    centroids, _ = kmeans.kmeans(features, 1, iterations=2)
    np.testing.assert_allclose(centroids[0], features.mean(axis=0), atol=1e-5)


def test_kmeans_depends_only_on_its_seed_and_leaves_numpys_random_state_unchanged(
    capfd: pytest.CaptureFixture[str],
) -> None:
    features, state = random(300, 5), np.random.get_state(legacy=False)["state"]["key"].copy()
    first, second, other = (kmeans.kmeans(features, 12, 5, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    assert not np.array_equal(first[0], other[0])
    np.testing.assert_array_equal(np.random.get_state(legacy=False)["state"]["key"], state)
    assert capfd.readouterr() == ("", "")  # FAISS prints no warning about few images per cluster


def test_more_clusters_than_images_are_refused_with_both_numbers() -> None:
    with pytest.raises(UserError, match="9 clusters were asked for of 8 images"):
        kmeans.kmeans(random(8, 2), 9)


def test_assign_takes_the_nearest_centroid_and_of_equally_near_ones_the_lowest_number() -> None:
    centroids = np.array([[0, 0], [2, 0], [2, 0]], np.float32)
    np.testing.assert_array_equal(kmeans.assign(np.array([[1, 0], [1.5, 0], [0, 9]], np.float32), centroids), [0, 1, 0])


def test_faiss_opens_a_written_index_in_which_each_feature_finds_itself(tmp_path: Path) -> None:
    features = random(30, 4)
    exact.write_index(tmp_path / "new" / "index.faiss", features)
    index = faiss.read_index(str(tmp_path / "new" / "index.faiss"))
    assert (index.ntotal, index.d) == (30, 4)
    np.testing.assert_array_equal(index.reconstruct_n(0, 30), features)
    np.testing.assert_array_equal(index.search(features, 1)[1][:, 0], np.arange(30))


def test_a_failed_write_leaves_the_old_index_and_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "index.faiss"
    exact.write_index(path, random(3, 2))
    old = path.read_bytes()

    def fail(handle: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        exact.write_index(path, random(4, 2))
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["index.faiss"]


def test_with_a_gpu_the_index_is_placed_on_it_in_full_precision_unless_float16_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    placed: list[tuple[int, bool]] = []

    class Options:
        useFloat16 = True

    def place(resources: object, device: int, index: faiss.Index, options: Options) -> faiss.Index:
        placed.append((device, options.useFloat16))
        return index

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "StandardGpuResources", object)
    monkeypatch.setattr(faiss, "GpuClonerOptions", Options)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", place)
    exact.search(random(3, 4), random(9, 4), 2)
    exact.search(random(3, 4), random(9, 4), 2, float16=True)
    kmeans.kmeans(random(20, 4), 3, 2)
    assert placed == [(0, False), (0, True), (0, False), (0, False)]
    placed.clear()
    exact.search(random(1, 1), random(exact.MAX_GPU_NEIGHBOURS + 1, 1), exact.MAX_GPU_NEIGHBOURS + 1)
    assert placed == []  # FAISS finds at most MAX_GPU_NEIGHBOURS on a GPU


@pytest.mark.skipif(not faiss.get_num_gpus(), reason="FAISS finds no GPU")
def test_a_gpu_finds_the_same_neighbours_and_clusters_as_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    q, x = random(300, 64, seed=1), random(5000, 64, seed=2)
    scores, ids = exact.search(q, x, 20, "cosine")
    clusters = kmeans.kmeans(x, 10)[1]
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    expected, order = exact.search(q, x, 20, "cosine")
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert np.mean(ids == order) > 0.999
    assert np.mean(clusters == kmeans.kmeans(x, 10)[1]) > 0.99


BOTH_LIBRARIES = """
import {0}
import {1}
import numpy as np
from compress_ssl.pipeline.search.kmeans import kmeans
x = np.random.default_rng(0).normal(size=(3000, 64)).astype(np.float32)
for _ in range(3):  # in turns, so that each library starts its threads after the other has used its own
    centroids, assignment = kmeans(x, 10, 5)
    t = torch.from_numpy(x)
    loss = (t @ torch.ones(64, 64, requires_grad=True)).square().mean()
    loss.backward()
print(int(assignment.sum()), round(float(loss), 3))
"""


def test_torch_and_faiss_work_in_one_process_in_either_import_order() -> None:
    """Each library contains its own OpenMP runtime, and two in one process are not guaranteed to work."""
    orders = [("torch", "faiss"), ("faiss", "torch")]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", BOTH_LIBRARIES.format(*order)], cwd=ROOT, stdout=-1, stderr=-1, text=True
        )
        for order in orders
    ]
    outputs = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] != ""


def test_checking_a_protocols_spec_imports_none_of_the_large_libraries() -> None:
    code = (
        "import sys; from compress_ssl.pipeline.search import exact\n"
        "from compress_ssl.pipeline.evaluators import PROTOCOLS\n"
        "[PROTOCOLS.check(p) for p in ('nn', 'knn:k=5', 'cluster', 'linear:augment=true')]\n"
        "print([m for m in ('faiss', 'torch', 'scipy', 'sklearn', 'matplotlib') if m in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert finished.stdout.strip() == "[]", finished
