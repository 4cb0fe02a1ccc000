"""One student's step and what is measured on the way, against plain loops."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.apprentice import Apprentice, Training, agreement, blend, optimizer, spell, spread
from pipeline.datasets.digits import Digits
from pipeline.method import Batch, Method
from pipeline.model import Embedder
from pipeline.models import build
from pipeline.schedule import Schedule
from pipeline.validation import leave_one_out, view_features
from pipeline.views import ViewSpec, draw, see

B, SIZE = 6, 8
PLAIN = ViewSpec("crop-flip", 0, 1.0)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Squares(Method):
    """The loss is the mean square of the embedding: enough to see what a step does."""

    def forward(self, batch: Batch, outputs: Any) -> list[Tensor]:
        return [outputs[0]["embedding"].float().pow(2).mean()]


def training(**said: Any) -> Training:
    default = {
        "optimizer": "sgd", "lr": 0.5, "momentum": 0.9, "weight_decay": 0.1, "norm_decay": True,
        "schedule": Schedule("constant"), "clip": None, "ema": None, "precision": "fp32", "seed": 0,
    }  # fmt: skip
    return Training(**{**default, **said})


def student(spec: str = "convnet:channels=4+5") -> Embedder:
    torch.manual_seed(0)
    return build(spec, image_size=SIZE)


def batch(step: int = 0) -> Batch:
    images = torch.rand(B, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(step))
    numbers = torch.zeros(B, 1, dtype=torch.int64)
    return Batch(step, torch.arange(B), numbers, numbers, {"embedding": images.flatten(1)[:, None, :7]}, [images])


def apprentice(folder: Path, spec: str = "convnet:channels=4+5", **said: Any) -> Apprentice:
    return Apprentice(folder, student(spec), Squares(), training(**said))


# ---------------------------------------------------------------- a step


def test_a_step_at_a_part_of_the_run_uses_the_schedules_rate(tmp_path: Path) -> None:
    one = apprentice(tmp_path, schedule=Schedule("cosine"))
    assert one.step(batch(), 0.5, measure=True)["lr"] == pytest.approx(0.25)


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_a_gradient_longer_than_the_clip_is_cut_to_it_and_a_shorter_one_is_not(clip: float, tmp_path: Path) -> None:
    clipped, free = (apprentice(tmp_path, clip=value, momentum=0.0, weight_decay=0.0) for value in (clip, None))
    before = nn.utils.parameters_to_vector(clipped.student.parameters()).detach().clone()
    moves = []
    for one in (clipped, free):
        one.step(batch(), 0.0)
        moves.append(before - nn.utils.parameters_to_vector(one.student.parameters()).detach())
    length = float(moves[1].norm()) / 0.5  # lr
    torch.testing.assert_close(moves[0], moves[1] * min(1.0, clip / length), rtol=1e-3, atol=1e-7)


def test_the_randomness_of_a_step_is_a_function_of_seed_step_and_student(tmp_path: Path) -> None:
    def drawn(step: int, **said: Any) -> float:
        one = apprentice(tmp_path, **said)
        torch.manual_seed(99)
        one.step(batch(step), 0.0)
        return float(torch.rand(()))

    assert drawn(3) == drawn(3)
    others = [drawn(4), drawn(3, seed=1), drawn(3, seed=2**63), drawn(3, spec="convnet:channels=4+6")]
    assert len({drawn(3), *others}) == 5


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_every_weight_decays_as_published_or_only_matrices_when_asked(kind: str) -> None:
    modules = nn.ModuleList([student(), nn.Linear(5, 3)])
    named = dict(modules.named_parameters())
    (whole,) = optimizer(training(optimizer=kind), modules).param_groups
    assert (whole["weight_decay"], len(whole["params"])) == (0.1, len(named))
    decayed, spared = optimizer(training(optimizer=kind, norm_decay=False), modules).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in spared["params"]} == {id(p) for p in named.values() if p.ndim == 1}
    assert len(decayed["params"]) + len(spared["params"]) == len(named)


def test_weights_that_take_no_gradient_are_left_out_of_the_optimiser() -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    (group,) = optimizer(training(), nn.ModuleList([frozen, nn.Linear(3, 3)])).param_groups
    assert [tuple(p.shape) for p in group["params"]] == [(3, 3), (3,)]


def test_the_average_moves_by_one_minus_its_decay_and_copies_batch_norm_statistics(tmp_path: Path) -> None:
    one = apprentice(tmp_path, ema=0.75)
    assert one.learned is one.average
    want = [p.detach().clone() for p in one.student.parameters()]
    for step in range(3):
        one.step(batch(step), 0.0)
        want = [0.75 * old + 0.25 * new.detach() for old, new in zip(want, one.student.parameters(), strict=True)]
    for got, expected in zip(one.learned.parameters(), want, strict=True):
        torch.testing.assert_close(got, expected)
    for got, theirs in zip(one.learned.buffers(), one.student.buffers(), strict=True):
        assert torch.equal(got, theirs)


def test_without_an_average_the_student_itself_is_kept(tmp_path: Path) -> None:
    one = apprentice(tmp_path)
    assert one.learned is one.student and one.parts()["average"] is None


def test_an_average_blends_parameters_only() -> None:
    slow, fast = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    nn.init.constant_(fast.weight, 3.0)
    fast(torch.randn(5, 2))
    blend(slow, fast, 0.5)
    assert slow.weight.tolist() == [2.0, 2.0]
    assert torch.equal(slow.running_mean, fast.running_mean) and int(slow.num_batches_tracked) == 1


def test_bf16_steps_keep_the_weights_in_single_precision(tmp_path: Path) -> None:
    one = apprentice(tmp_path, precision="bf16")
    row = one.step(batch(), 0.0, measure=True)
    assert {p.dtype for p in one.student.parameters()} == {torch.float32}
    assert all(math.isfinite(value) for value in row.values())


# ---------------------------------------------------------------- what is measured


def unit(rows: Tensor) -> list[list[float]]:
    return [[v / math.hypot(*row) for v in row] for row in rows.tolist()]


@given(st.integers(2, 9), st.integers(1, 6), st.integers(0, 999))
def test_spread_is_the_deviation_of_unit_embeddings_from_their_mean(n: int, d: int, seed: int) -> None:
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    u = unit(z)
    centre = [sum(row[j] for row in u) / n for j in range(d)]
    slow = math.sqrt(sum((row[j] - centre[j]) ** 2 for row in u for j in range(d)) / n)
    assert spread(z) == pytest.approx(slow, abs=1e-5)


def test_spread_is_zero_for_a_collapsed_student_and_near_one_for_a_full_sphere() -> None:
    assert spread(torch.ones(8, 3) * torch.arange(1.0, 9.0)[:, None]) == pytest.approx(0, abs=1e-6)
    assert spread(torch.randn(4000, 64)) == pytest.approx(1, abs=0.01)


@given(st.integers(2, 9), st.integers(0, 999))
def test_agreement_is_the_share_of_rows_with_the_same_nearest_other_row(n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z, t = torch.randn(n, 3, generator=generator), torch.randn(n, 5, generator=generator)

    def nearest(rows: Tensor, i: int) -> int:
        u = unit(rows)
        return max((j for j in range(n) if j != i), key=lambda j: sum(a * b for a, b in zip(u[i], u[j], strict=True)))

    slow = 100 * sum(nearest(z, i) == nearest(t, i) for i in range(n)) / n
    assert agreement(z, t) == pytest.approx(slow)
    assert agreement(t * 7, t) == 100


def test_the_check_on_val_is_leave_one_out_by_cosine_on_the_plain_view() -> None:
    net, digits = student(), Digits(split="test").subset(60)
    digits.label[5] = -1  # unlabelled images do not count, neither as queries nor as neighbours
    net.eval()
    with torch.no_grad():
        pixels = [see(digits.load(i)[0], PLAIN, draw(0, i, [0]), [0], [(SIZE, "bilinear")])[0] for i in range(60)]
        z = unit(net(net.prepare(torch.cat(pixels))))
    known = [i for i in range(60) if digits.label[i] >= 0]
    hits = 0
    for i in known:
        others = [j for j in known if j != i]
        nearest = max(others, key=lambda j: sum(a * b for a, b in zip(z[i], z[j], strict=True)))
        hits += digits.label[nearest] == digits.label[i]
    net.train()
    assert leave_one_out(net, digits, PLAIN, CPU) == pytest.approx(100 * hits / len(known))
    assert net.training, "training goes on as it was"


def test_checking_leaves_the_batch_norm_statistics_alone() -> None:
    net = student().train()
    before = [buffer.clone() for buffer in net.buffers()]
    leave_one_out(net, Digits(split="test").subset(30), PLAIN, CPU)
    assert all(torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True))


def test_features_of_a_view_do_not_depend_on_how_they_are_batched() -> None:
    net, digits = student(), Digits().subset(50)
    whole, rows = view_features(net, digits, PLAIN, CPU)
    parts, some = view_features(net, digits, PLAIN, CPU, rows=np.arange(10, 40), batch=7)
    assert rows.tolist() == list(range(50)) and some.tolist() == list(range(10, 40))
    torch.testing.assert_close(parts, whole[10:40])


# ---------------------------------------------------------------- what is delivered


def test_the_file_of_a_student_is_valid_and_has_one_spelling(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor(5), "c": torch.zeros(0)}
    said = {"format": "pt", "model": "ümläut", "preprocessing": '{"size": 8}'}
    assert len({spell(tensors, said) for _ in range(20)}) == 1
    (tmp_path / "s.safetensors").write_bytes(spell(tensors, said))
    back = safetensors.torch.load_file(tmp_path / "s.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    with safetensors.safe_open(tmp_path / "s.safetensors", "pt") as file:
        assert file.metadata() == said


def test_delivered_again_it_is_the_same_file_byte_for_byte(tmp_path: Path) -> None:
    one, seen = apprentice(tmp_path), set()
    for _ in range(12):
        seen.add(one.deliver().read_bytes())
        (tmp_path / "student.safetensors").unlink()
    assert len(seen) == 1
