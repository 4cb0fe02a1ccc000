"""A student: its validation on labelled images and the file that it exports."""

import math
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from compress_ssl.pipeline.datasets.digits import Digits
from compress_ssl.pipeline.extraction.extract import FeatureSource
from compress_ssl.pipeline.extraction.feature_extractor import FeatureExtractor
from compress_ssl.pipeline.extraction.features import view_features
from compress_ssl.pipeline.extraction.view_batches import model_views
from compress_ssl.pipeline.models import build
from compress_ssl.pipeline.models.embedder import Embedder
from compress_ssl.pipeline.models.weights import to_bytes
from compress_ssl.pipeline.training.student import Student
from compress_ssl.pipeline.training.validation import leave_one_out
from compress_ssl.pipeline.views.augment import ViewSpec, draw_variates
from compress_ssl.pipeline.views.render import render_views

SIZE = 8
VIEW_SPEC = ViewSpec("crop-flip", 0, 1.0)
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def build_student(spec: str = "convnet:channels=4+5") -> Embedder:
    torch.manual_seed(0)
    return build(spec, image_size=SIZE)


def unit_rows(rows: Tensor) -> list[list[float]]:
    return [[v / math.hypot(*row) for v in row] for row in rows.tolist()]


def test_validation_is_leave_one_out_by_cosine_on_view_0() -> None:
    net, digits = build_student(), Digits(split="test").subset(60)
    digits.label[5] = -1  # unlabelled images do not count, neither as queries nor as neighbours
    net.eval()
    with torch.no_grad():
        pixels = [
            render_views(digits.load(i)[0], VIEW_SPEC, draw_variates(0, i, [0]), [0], [(SIZE, "bilinear")])[0]
            for i in range(60)
        ]
        z = unit_rows(net(net.prepare(torch.cat(pixels))))
    known = [i for i in range(60) if digits.label[i] >= 0]
    hits = 0
    for i in known:
        others = [j for j in known if j != i]
        nearest = max(others, key=lambda j: sum(a * b for a, b in zip(z[i], z[j], strict=True)))
        hits += digits.label[nearest] == digits.label[i]
    net.train()
    assert leave_one_out(net, digits, VIEW_SPEC, CPU) == pytest.approx(100 * hits / len(known))
    assert net.training, "the model must still be in training mode"


def test_validation_does_not_change_the_batch_norm_statistics() -> None:
    net = build_student().train()
    before = [buffer.clone() for buffer in net.buffers()]
    leave_one_out(net, Digits(split="test").subset(30), VIEW_SPEC, CPU)
    assert all(torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True))


def test_features_of_a_view_do_not_depend_on_the_batch_size() -> None:
    net, digits = build_student(), Digits().subset(50)
    extractor, views = FeatureExtractor.unpadded(net, CPU), model_views(digits, VIEW_SPEC, net)
    small = FeatureExtractor(net, CPU, batch_size=7, padded=False)
    whole, rows = view_features(FeatureSource(extractor, views), np.arange(50))
    parts, part_rows = view_features(FeatureSource(small, views), np.arange(10, 40))
    assert rows.tolist() == list(range(50)) and part_rows.tolist() == list(range(10, 40))
    np.testing.assert_allclose(parts, whole[10:40], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- export


def test_a_safetensors_file_is_valid_and_its_bytes_are_a_function_of_its_content(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor(5), "c": torch.zeros(0)}
    metadata = {"format": "pt", "model": "ümläut", "preprocessing": '{"size": 8}'}
    assert len({to_bytes(tensors, metadata) for _ in range(20)}) == 1
    (tmp_path / "s.safetensors").write_bytes(to_bytes(tensors, metadata))
    back = safetensors.torch.load_file(tmp_path / "s.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    with safetensors.safe_open(tmp_path / "s.safetensors", "pt") as file:
        assert file.metadata() == metadata


def test_exporting_again_writes_the_same_bytes(tmp_path: Path) -> None:
    student, contents = Student(tmp_path, build_student()), set()
    for _ in range(12):
        contents.add(student.export().read_bytes())
        (tmp_path / "student.safetensors").unlink()
    assert len(contents) == 1
