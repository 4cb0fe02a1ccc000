"""One student: how it is checked against labelled images, and what it delivers."""

import math
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from compress_ssl.pipeline.datasets.digits import Digits
from compress_ssl.pipeline.extraction.features import view_features
from compress_ssl.pipeline.models import build
from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.models.weights import to_bytes
from compress_ssl.pipeline.training.student import Student
from compress_ssl.pipeline.training.validation import leave_one_out
from compress_ssl.pipeline.views.augment import ViewSpec, draw_variates
from compress_ssl.pipeline.views.render import render_views

SIZE = 8
PLAIN = ViewSpec("crop-flip", 0, 1.0)
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def student(spec: str = "convnet:channels=4+5") -> Embedder:
    torch.manual_seed(0)
    return build(spec, image_size=SIZE)


def unit(rows: Tensor) -> list[list[float]]:
    return [[v / math.hypot(*row) for v in row] for row in rows.tolist()]


def test_the_check_on_val_is_leave_one_out_by_cosine_on_the_plain_view() -> None:
    net, digits = student(), Digits(split="test").subset(60)
    digits.label[5] = -1  # unlabelled images do not count, neither as queries nor as neighbours
    net.eval()
    with torch.no_grad():
        pixels = [
            render_views(digits.load(i)[0], PLAIN, draw_variates(0, i, [0]), [0], [(SIZE, "bilinear")])[0]
            for i in range(60)
        ]
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
    assert len({to_bytes(tensors, said) for _ in range(20)}) == 1
    (tmp_path / "s.safetensors").write_bytes(to_bytes(tensors, said))
    back = safetensors.torch.load_file(tmp_path / "s.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    with safetensors.safe_open(tmp_path / "s.safetensors", "pt") as file:
        assert file.metadata() == said


def test_delivered_again_it_is_the_same_file_byte_for_byte(tmp_path: Path) -> None:
    one, seen = Student(tmp_path, student()), set()
    for _ in range(12):
        seen.add(one.export().read_bytes())
        (tmp_path / "student.safetensors").unlink()
    assert len(seen) == 1
