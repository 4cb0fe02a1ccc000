"""Each protocol is compared with a slow transcription of its paper or of the authors' code."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from compress_ssl.pipeline.evaluators import PROTOCOLS
from compress_ssl.pipeline.evaluators.base import Evaluator, Result, Split, per_class
from compress_ssl.pipeline.evaluators.cluster import count_shared_images, match_clusters, score_assignments
from compress_ssl.pipeline.evaluators.linear import LinearProbe, whitening_statistics
from compress_ssl.pipeline.evaluators.scoring import score_all
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.search import exact, kmeans

SPECS = ("nn", "knn:k=5", "cluster", "linear:epochs=2")


def blobs(n: int, classes: int = 4, d: int = 10, noise: float = 1.0, seed: int = 0, labelled: bool = True) -> Split:
    """A split of Gaussian classes; their centres are the same for every seed."""
    centres = np.random.default_rng(99).normal(size=(classes, d))
    draw = np.random.default_rng(seed)
    label = draw.permutation(np.arange(n) % classes)
    features = ((centres[label] + noise * draw.normal(size=(n, d))) * draw.uniform(1, 20, (n, 1))).astype(np.float32)
    given = label if labelled else np.full(n, -1)
    return Split(features, given.astype(np.int64), np.arange(n) + 1000, tuple("abcdefghij"[:classes]))


def with_labels(split: Split, label: np.ndarray, classes: tuple[str, ...] | None = None) -> Split:
    return Split(split.features, label.astype(np.int64), split.rows, classes or split.classes)


def run(spec: str, train: Split, val: Split, folder: Path, augmented: Any = None) -> Result:
    evaluator: Evaluator = PROTOCOLS.build(spec)
    return evaluator(train, val, folder, augmented)


TRAIN, VAL = blobs(120, seed=1), blobs(60, seed=2)


# ---------------------------------------------------------------- all protocols


@pytest.mark.parametrize("spec", SPECS)
def test_the_same_splits_give_the_same_result_and_are_not_changed(spec: str, tmp_path: Path) -> None:
    train, val = blobs(60, seed=3), blobs(30, seed=4)
    for array in (train.features, train.label, val.features, val.label):
        array.flags.writeable = False
    first, second = run(spec, train, val, tmp_path), run(spec, train, val, tmp_path)
    assert first.metrics == second.metrics
    for key, array in first.arrays.items():
        np.testing.assert_array_equal(array, second.arrays[key])


@pytest.mark.parametrize("spec", SPECS)
def test_a_protocol_neither_uses_nor_changes_the_global_random_state(spec: str, tmp_path: Path) -> None:
    results = []
    for seed in (1, 2):
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].copy()
        results.append(run(spec, TRAIN, VAL, tmp_path).metrics)
        assert torch.equal(torch.get_rng_state(), before[0])
        np.testing.assert_array_equal(np.random.get_state(legacy=False)["state"]["key"], before[1])
    assert results[0] == results[1]


@pytest.mark.parametrize("spec", ["nn", "knn", "linear"])
@pytest.mark.parametrize("which", ["training", "validation"])
def test_nn_knn_and_linear_refuse_images_without_labels(spec: str, which: str, tmp_path: Path) -> None:
    unlabelled = blobs(40, labelled=False)
    train, val = (unlabelled, VAL) if which == "training" else (TRAIN, unlabelled)
    assert PROTOCOLS.build(spec).needs_labels == ("training", "validation")
    with pytest.raises(UserError, match=f"needs labels, but 40 of 40 {which} images have none.*cluster:clusters=K"):
        run(spec, train, val, tmp_path)


@pytest.mark.parametrize("spec", ["nn", "knn", "linear"])
def test_a_training_set_of_one_class_is_refused_with_the_name_of_the_class(spec: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="every training image is of the one class 'a'"):
        run(spec, with_labels(TRAIN, np.zeros(120)), with_labels(VAL, np.zeros(60)), tmp_path)


@pytest.mark.parametrize(
    "spec",
    ["knn:k=0", "knn:temperature=0", "cluster:clusters=1", "cluster:iterations=0", "linear:epochs=0", "linear:lr=0"],
)
def test_an_option_out_of_range_is_refused_when_the_protocol_is_built(spec: str) -> None:
    with pytest.raises(UserError, match=spec.partition(":")[2].replace(".", r"\.")):
        PROTOCOLS.build(spec)


def test_accuracy_per_class_is_nan_for_a_class_without_images() -> None:
    found = per_class(np.array([0, 1, 1]), np.array([0, 0, 1]), 3)
    np.testing.assert_array_equal(found, [50, 100, np.nan])


# ---------------------------------------------------------------- neighbours


def unit(features: np.ndarray) -> np.ndarray:
    """Rows of length 1, in float64."""
    x = features.astype(np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_nn_is_the_share_of_images_whose_nearest_training_image_is_of_their_class(tmp_path: Path) -> None:
    found = run("nn", TRAIN, VAL, tmp_path)
    distance = ((unit(VAL.features)[:, None] - unit(TRAIN.features)[None]) ** 2).sum(axis=2)
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :8]
    np.testing.assert_array_equal(found.arrays["neighbors"], nearest)
    hits = [TRAIN.label[row[0]] == VAL.label[n] for n, row in enumerate(nearest)]
    assert found.metrics == {"top1": 100 * sum(hits) / 60}
    assert 40 < found.metrics["top1"] < 100  # so that a wrong protocol would be noticed


def test_nn_writes_an_index_of_the_normalised_training_features(tmp_path: Path) -> None:
    import faiss

    run("nn", TRAIN, VAL, tmp_path)
    run("nn", TRAIN, VAL, tmp_path)
    index = faiss.read_index(str(tmp_path / "index.faiss"))
    np.testing.assert_array_equal(index.reconstruct_n(0, 120), exact.normalize(TRAIN.features))
    assert [p.name for p in tmp_path.iterdir()] == ["index.faiss"]


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.07), (20, 0.5), (120, 0.001)])
def test_knn_is_dinos_weighted_vote(k: int, temperature: float, tmp_path: Path) -> None:
    found = run(f"knn:k={k},temperature={temperature}", TRAIN, VAL, tmp_path)
    train, hits = unit(TRAIN.features), 0
    for query, label in zip(unit(VAL.features), VAL.label, strict=True):
        similar = train @ query
        votes = dict.fromkeys(range(4), 0.0)
        for n in sorted(range(120), key=lambda n: -similar[n])[:k]:
            votes[int(TRAIN.label[n])] += math.exp((similar[n] - 1) / temperature)
        hits += max(votes, key=lambda c: votes[c]) == label
    key = str(k) if temperature == 0.07 else f"{k},temperature={temperature:g}"
    assert found.metrics == {key: {"top1": pytest.approx(100 * hits / 60)}}


def test_of_two_classes_with_equal_votes_knn_predicts_the_first(tmp_path: Path) -> None:
    same = np.ones((4, 3), np.float32)
    train = Split(same, np.array([2, 1, 2, 1]), np.arange(4), ("a", "b", "c"))
    val = Split(same, np.array([0, 1, 2, 1]), np.arange(4), ("a", "b", "c"))
    assert run("knn:k=4", train, val, tmp_path).metrics == {"4": {"top1": 50}}


def test_knn_refuses_more_neighbours_than_training_images_and_names_the_largest_k(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"200 neighbours.*120 training images; pass knn:k=120 or less"):
        run("knn:k=200", TRAIN, VAL, tmp_path)


# ---------------------------------------------------------------- clusters


def papers_cluster_top1(
    train_cluster: list[int], train_label: list[int], val_cluster: list[int], val_label: list[int], k: int
) -> float:
    """top1 as in eval_cluster_alignment.py of CompRess, with sets; but an empty cluster shares nothing."""
    clusters = [{i for i, c in enumerate(train_cluster) if c == n} for n in range(k)]
    categories = [{i for i, c in enumerate(train_label) if c == n} for n in range(k)]
    cost = [[-len(c & y) / len(c) if c else 0.0 for y in categories] for c in clusters]
    _, category_of = linear_sum_assignment(np.array(cost))
    correct = total = 0
    for n in range(k):
        mine = {i for i, c in enumerate(val_cluster) if c == n}
        theirs = {i for i, c in enumerate(val_label) if c == category_of[n]}
        correct += len(mine & theirs)
        total += len(theirs)
    return 100 * correct / total


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 6), st.integers(0, 2**32 - 1), st.booleans())
def test_cluster_top1_equals_the_papers_for_any_assignment_even_with_an_empty_cluster(
    k: int, seed: int, empty: bool
) -> None:
    draw = np.random.default_rng(seed)
    ours, theirs = draw.integers(0, k - empty, 40), draw.integers(0, k, 25)
    train, val = draw.integers(0, k, 40), draw.integers(0, k, 25)
    found, _ = score_assignments(ours, train, theirs, val, k, k)
    assert found["top1"] == pytest.approx(
        papers_cluster_top1(ours.tolist(), train.tolist(), theirs.tolist(), val.tolist(), k)
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_hungarian_top1_is_the_best_of_all_one_to_one_maps_on_validation(k: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    ours, train, theirs, val = (draw.integers(0, k, n) for n in (30, 30, 20, 20))
    found, _ = score_assignments(ours, train, theirs, val, k, k)
    best = max(np.mean(np.array(p)[theirs] == val) for p in itertools.permutations(range(k)))
    assert found["hungarian_top1"] == pytest.approx(100 * best)
    assert found["hungarian_top1"] >= found["top1"] - 1e-9


def test_the_paper_maps_by_share_of_the_cluster_and_the_usual_accuracy_by_counts() -> None:
    """Cluster 0: 7 of a, 4 of b. Cluster 1: 2 of a only. By shares 1 -> a; by counts 0 -> a."""
    cluster = np.array([0] * 11 + [1] * 2)
    label = np.array([0] * 7 + [1] * 4 + [0] * 2)
    counts = count_shared_images(cluster, label, 2, 2)
    np.testing.assert_array_equal(counts, [[7, 4], [2, 0]])
    found, arrays = score_assignments(cluster, label, cluster, label, 2, 2)
    np.testing.assert_array_equal(arrays["mapping"], [1, 0])  # 4/11 + 2/2 > 7/11 + 0
    np.testing.assert_array_equal(match_clusters(counts), [0, 1])  # 7 + 0 > 4 + 2
    assert (found["top1"], found["hungarian_top1"]) == (pytest.approx(100 * 6 / 13), pytest.approx(100 * 7 / 13))


def test_validation_is_scored_with_the_map_of_training() -> None:
    cluster, label = np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1])
    found, arrays = score_assignments(cluster, label, cluster, 1 - label, 2, 2)
    assert (found["top1"], found["hungarian_top1"], found["train_top1"]) == (0, 100, 100)
    np.testing.assert_array_equal(arrays["confusion"], [[0, 2, 0], [2, 0, 0]])


def test_nmi_is_mutual_information_over_the_mean_entropy() -> None:
    draw = np.random.default_rng(5)
    cluster, label = draw.integers(0, 4, 50), draw.integers(0, 3, 50)
    joint = count_shared_images(cluster, label, 4, 3) / 50
    entropy = [-sum(p * math.log(p) for p in joint.sum(axis=axis) if p) for axis in (0, 1)]
    shared = sum(
        joint[c, y] * math.log(joint[c, y] / (joint[c].sum() * joint[:, y].sum()))
        for c, y in itertools.product(range(4), range(3))
        if joint[c, y]
    )
    found, _ = score_assignments(cluster, label, cluster, label, 4, 3)
    assert found["nmi"] == pytest.approx(100 * shared / (sum(entropy) / 2))


def test_cluster_scores_features_as_kmeans_and_the_papers_map_do(tmp_path: Path) -> None:
    found = run("cluster", TRAIN, VAL, tmp_path)
    ours = exact.normalize(TRAIN.features)
    centroids, assignment = kmeans.kmeans(ours, 4, 20, 1234)
    theirs = [int(((centroids - v) ** 2).sum(axis=1).argmin()) for v in exact.normalize(VAL.features)]
    np.testing.assert_array_equal(found.arrays["centroids"], centroids)
    np.testing.assert_array_equal(found.arrays["val_assignment"], theirs)
    expected = papers_cluster_top1(assignment.tolist(), TRAIN.label.tolist(), theirs, VAL.label.tolist(), 4)
    assert found.metrics["top1"] == pytest.approx(expected)
    assert (found.metrics["clusters"], found.metrics["empty"]) == (4, 0)


def test_clusters_beyond_the_classes_get_no_class_and_all_their_images_are_errors(tmp_path: Path) -> None:
    found = run("cluster:clusters=6", blobs(120, noise=0.1, seed=1), blobs(60, noise=0.1, seed=2), tmp_path)
    mapping, confusion = found.arrays["mapping"], found.arrays["confusion"]
    assert sorted(mapping.tolist()) == [-1, -1, 0, 1, 2, 3]
    lost = np.isin(found.arrays["val_assignment"], np.flatnonzero(mapping < 0))
    assert confusion[:, -1].sum() == lost.sum() > 0 and confusion.sum() == 60
    assert found.metrics["top1"] == pytest.approx(100 * np.trace(confusion[:, :-1]) / 60)
    assert found.metrics["top1"] <= 100 - 100 * lost.mean()


def test_with_fewer_clusters_than_classes_some_classes_have_no_cluster(tmp_path: Path) -> None:
    found = run("cluster:clusters=2", TRAIN, VAL, tmp_path)
    assert len(set(found.arrays["mapping"].tolist())) == 2 and found.metrics["top1"] <= 50


def test_identical_images_leave_clusters_empty_and_are_still_scored(tmp_path: Path) -> None:
    same = np.ones((20, 3), np.float32)
    split = Split(same, np.arange(20) % 4, np.arange(20), tuple("abcd"))
    found = run("cluster", split, split, tmp_path)
    assert found.metrics["empty"] == 3 and found.metrics["top1"] == 25
    assert (found.arrays["majority"] < 0).sum() == 3


def test_without_labels_clusters_are_computed_and_scores_are_null(tmp_path: Path) -> None:
    unlabelled = blobs(80, labelled=False)
    found = run("cluster:clusters=5", unlabelled, VAL, tmp_path)
    assert found.metrics["clusters"] == 5
    assert all(found.metrics[key] is None for key in ("top1", "hungarian_top1", "nmi"))
    assert found.arrays["centroids"].shape == (5, 10) and found.arrays["train_assignment"].max() == 4
    assert not PROTOCOLS.build("cluster").needs_labels


def test_without_labels_the_number_of_clusters_must_be_given(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cluster:clusters=K"):
        run("cluster", blobs(80, labelled=False), VAL, tmp_path)


def test_fewer_training_images_than_clusters_are_refused_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="130 clusters need at least 130 training images, and there are 120"):
        run("cluster:clusters=130", TRAIN, VAL, tmp_path)


def test_images_without_a_label_are_clustered_but_not_scored(tmp_path: Path) -> None:
    label = VAL.label.copy()
    label[::2] = -1
    found = run("cluster", TRAIN, with_labels(VAL, label), tmp_path)
    hits = found.arrays["mapping"][found.arrays["val_assignment"]] == VAL.label
    assert found.metrics["top1"] == pytest.approx(100 * hits[1::2].mean())
    assert found.arrays["confusion"].sum() == 30


# ---------------------------------------------------------------- linear


class FullBatchNorm(torch.nn.Module):
    """Whitening as in eval_linear.py of CompRess: fixed statistics and no affine parameters."""

    def __init__(self, var: torch.Tensor, mean: torch.Tensor) -> None:
        super().__init__()
        self.inv_std, self.mean = 1.0 / torch.sqrt(var + 1e-5), mean

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) * self.inv_std


def papers_probe(
    train: Split, val: Split, view: Callable[[int], np.ndarray], epochs: int, milestones: list[int], seed: int
) -> tuple[list[tuple[float, float]], np.ndarray]:
    """([(top-1, top-5) on validation after each epoch], last weight) by the main loop of eval_linear.py."""

    def embed(features: np.ndarray) -> torch.Tensor:
        x = torch.from_numpy(features)
        return x / x.norm(2, dim=1, keepdim=True)

    var, mean = torch.var_mean(embed(train.features), dim=0)
    random = torch.Generator().manual_seed(seed)
    layer = torch.nn.Linear(train.features.shape[1], len(train.classes))
    bound = 1 / math.sqrt(layer.in_features)
    for part in (layer.weight, layer.bias):
        torch.nn.init.uniform_(part, -bound, bound, generator=random)
    model = torch.nn.Sequential(FullBatchNorm(var, mean), layer)
    sgd = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(sgd, milestones=milestones)
    label, found = torch.from_numpy(train.label), []
    for epoch in range(epochs):
        x = embed(view(epoch))
        for batch in torch.utils.data.BatchSampler(torch.randperm(len(x), generator=random).tolist(), 256, False):
            loss = torch.nn.functional.cross_entropy(model(x[batch]), label[batch])
            sgd.zero_grad()
            loss.backward()
            sgd.step()
        schedule.step()
        with torch.no_grad():
            order = model(embed(val.features)).argsort(dim=1, descending=True)
        hits = order[:, :5] == torch.from_numpy(val.label)[:, None]
        found.append((100 * hits[:, 0].double().mean().item(), 100 * hits.any(dim=1).double().mean().item()))
    return found, layer.weight.detach().numpy()


def test_linear_equals_the_training_loop_of_compress_epoch_by_epoch(tmp_path: Path) -> None:
    train, val = blobs(600, classes=8, seed=1), blobs(200, classes=8, seed=2)
    with torch.random.fork_rng():
        expected, weight = papers_probe(train, val, lambda _: train.features, 40, [15, 30, 40], seed=3)
    found = run("linear:seed=3", train, val, tmp_path)
    np.testing.assert_allclose(found.arrays["weight"], weight, atol=1e-4)
    np.testing.assert_allclose(found.arrays["curve"][:, 1:], expected, atol=0.51)  # at most one image of 200
    assert np.mean(np.isclose(found.arrays["curve"][:, 1:], expected)) > 0.95
    assert found.metrics["last"] == {
        "top1": pytest.approx(found.arrays["curve"][-1, 1]),
        "top5": pytest.approx(found.arrays["curve"][-1, 2]),
    }
    assert found.metrics["protocol"] == "centre-crop features, whitened"
    assert 20 < found.metrics["last"]["top1"] < found.metrics["last"]["top5"] < 100


def test_best_is_the_best_epoch_on_validation_and_is_marked_as_selected_there(tmp_path: Path) -> None:
    found = run("linear:lr=0.5,epochs=12", TRAIN, VAL, tmp_path)
    curve, best = found.arrays["curve"], found.metrics["best"]
    assert best["top1"] == curve[:, 1].max() and best["selected_on"] == "validation"
    assert best["top5"] == curve[best["epoch"] - 1, 2] and curve[best["epoch"] - 1, 1] == best["top1"]


def test_the_learning_rate_is_divided_by_ten_after_15_and_30_of_40_epochs_and_in_proportion() -> None:
    rates = [LinearProbe().learning_rate(epoch) for epoch in range(40)]
    np.testing.assert_allclose(rates, [0.01] * 15 + [0.001] * 15 + [0.0001] * 10)
    np.testing.assert_allclose(
        [LinearProbe(epochs=8).learning_rate(e) for e in range(8)], [0.01] * 3 + [1e-3] * 3 + [1e-4] * 2
    )
    assert LinearProbe(epochs=1).learning_rate(0) == 0.01


def test_the_seed_decides_the_initial_layer_and_the_order_of_images(tmp_path: Path) -> None:
    weights = [run(f"linear:epochs=1,seed={s}", TRAIN, VAL, tmp_path).arrays["weight"] for s in (0, 0, 1)]
    np.testing.assert_array_equal(weights[0], weights[1])
    assert not np.array_equal(weights[0], weights[2])


def test_whitening_uses_torchs_unbiased_variance_with_the_papers_epsilon() -> None:
    x = exact.normalize(TRAIN.features)
    x[:, 3] = 0  # a constant dimension
    var, mean = torch.var_mean(torch.from_numpy(x), dim=0)
    found = whitening_statistics(x)
    np.testing.assert_allclose(found[0], mean.numpy(), atol=1e-6)
    np.testing.assert_allclose(found[1], (1 / torch.sqrt(var + 1e-5)).numpy(), rtol=1e-5)
    assert found[1][3] == pytest.approx(316.2278)


def test_the_augmented_probe_trains_on_a_new_view_each_epoch_whitened_by_the_centre_crops(tmp_path: Path) -> None:
    epochs: list[int] = []

    def view(epoch: int) -> np.ndarray:
        epochs.append(epoch)
        noise = np.random.default_rng(epoch).normal(size=TRAIN.features.shape)
        return (TRAIN.features + noise).astype(np.float32)

    found = run("linear:augment=true,epochs=4", TRAIN, VAL, tmp_path, view)
    assert epochs == [0, 1, 2, 3]
    assert found.metrics["protocol"] == "augmented training images, whitened"
    with torch.random.fork_rng():
        expected, weight = papers_probe(TRAIN, VAL, view, 4, [2, 3], seed=0)
    np.testing.assert_allclose(found.arrays["weight"], weight, atol=1e-4)
    np.testing.assert_allclose(found.arrays["curve"][:, 1:], expected, atol=1.7)  # one image of 60
    np.testing.assert_array_equal(found.arrays["mean"], run("linear:epochs=1", TRAIN, VAL, tmp_path).arrays["mean"])


def test_an_augmented_probe_on_the_centre_crops_equals_the_plain_probe(tmp_path: Path) -> None:
    plain = run("linear:epochs=3", TRAIN, VAL, tmp_path)
    same = run("linear:epochs=3,augment=true", TRAIN, VAL, tmp_path, lambda _: TRAIN.features)
    np.testing.assert_array_equal(plain.arrays["weight"], same.arrays["weight"])


@pytest.mark.parametrize("commands", [("linear", "linear:augment=true"), ("linear:augment=true", "linear")])
def test_metrics_keep_both_the_plain_and_the_augmented_probe_in_either_order(
    commands: tuple[str, ...], tmp_path: Path
) -> None:
    for spec in commands:
        evaluators = {spec: PROTOCOLS.build(spec)}
        gathered = score_all(evaluators, TRAIN, VAL, lambda epoch: TRAIN.features, tmp_path)
    metrics = gathered.protocols
    assert metrics["linear"]["protocol"] == "centre-crop features, whitened"
    assert metrics["linear_augmented"]["protocol"] == "augmented training images, whitened"
    titles = [score.title for score in gathered.scores]
    assert titles == [f"Linear{kind}{what}" for kind in ("", " (augmented)") for what in ("", " top-5", " best")]
    assert [figure.name for figure in gathered.figures] == ["linear", "linear_augmented"]


def test_the_augmented_probe_is_refused_where_only_stored_features_are_at_hand(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only stored features are at hand"):
        run("linear:augment=true", TRAIN, VAL, tmp_path)


def test_a_device_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="device=cuda:99 cannot be used"):
        run("linear:device=cuda:99", TRAIN, VAL, tmp_path)


def test_the_saved_weights_reproduce_the_reported_score(tmp_path: Path) -> None:
    found = run("linear:epochs=5", TRAIN, VAL, tmp_path)
    a = found.arrays
    logits = (exact.normalize(VAL.features) - a["mean"]) * a["scale"] @ a["weight"].T + a["bias"]
    assert 100 * np.mean(logits.argmax(axis=1) == VAL.label) == pytest.approx(found.metrics["last"]["top1"])
    np.testing.assert_array_equal(a["prediction"], logits.argmax(axis=1))
