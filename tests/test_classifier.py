"""`classifier:head=FILE`: a student's own classifier and a teacher's label head, scored as they are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from compress_ssl.pipeline.evaluators import PROTOCOLS
from compress_ssl.pipeline.evaluators.base import Split
from compress_ssl.pipeline.evaluators.results import Results
from compress_ssl.pipeline.models import linear_head
from compress_ssl.pipeline.models.linear_head import LinearHead
from compress_ssl.pipeline.report.metrics import headline_scores
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.stages import distill, evaluate, export_teacher, label_head, menus

pytestmark = pytest.mark.usefixtures("one_thread")

N, WIDTH = 50, 6
NAMES = tuple("abcdefgh")
VAL = "digits:split=test"


def spec(file: Path) -> str:
    return f"classifier:head={file}"


def images(label: np.ndarray, classes: tuple[str, ...] = NAMES, seed: int = 0) -> Split:
    features = np.random.default_rng(seed).normal(size=(len(label), WIDTH)).astype(np.float32)
    return Split(features * 5, label.astype(np.int64), np.arange(len(label)), classes)


BARE = images(np.full(3, -1), ())
LABELLED = images(np.arange(N) % len(NAMES))


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """saved(names, unit=..., width=...) writes a head of random numbers."""

    def write(names: Any = NAMES, *, classes: int = 0, unit: bool = False, width: int = WIDTH, seed: int = 1) -> Path:
        draw, count = torch.Generator().manual_seed(seed), classes or len(names)
        head = LinearHead(
            torch.randn(count, width, generator=draw), torch.randn(count, generator=draw), names, unit=unit
        )
        linear_head.save(head, tmp_path / "head.safetensors")
        return tmp_path / "head.safetensors"

    return write


def ranking(features: np.ndarray, weight: np.ndarray, bias: np.ndarray, unit: bool) -> list[list[int]]:
    """The classes of each row from the likeliest to the least, one number after another."""
    out = []
    for f in features.astype(np.float64):
        f = f / np.sqrt(sum(x * x for x in f)) if unit else f
        logits = [sum(w * x for w, x in zip(row, f, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
        out.append(sorted(range(len(logits)), key=lambda c: -logits[c]))
    return out


def check(file: Path, val: Split, metrics: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Metrics and arrays against the slow way, from the bare tensors of the file."""
    head = linear_head.load(file)
    bare, names = safetensors.torch.load_file(file), head.names or val.classes
    order = ranking(val.features, bare["weight"].double().numpy(), bare["bias"].double().numpy(), head.unit)
    said = [[names[c] for c in row] for row in order]
    true = [val.classes[y] for y in val.label]
    pairs = list(zip(said, true, strict=True))
    assert metrics["top1"] == pytest.approx(100 * sum(s[0] == t for s, t in pairs) / len(pairs))
    if len(names) > 5:
        assert metrics["top5"] == pytest.approx(100 * sum(t in s[:5] for s, t in pairs) / len(pairs))
    each = {c: [s[0] == c for s, t in pairs if t == c] for c in set(true)}
    assert metrics["mean_per_class"] == pytest.approx(100 * np.mean([np.mean(hits) for hits in each.values()]))
    known = [None if p < 0 else val.classes[p] for p in arrays["prediction"]]
    assert known == [s[0] if s[0] in val.classes else None for s in said]


# ---------------------------------------------------------------- the protocol


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("names", [NAMES, tuple("hcbagfde"), tuple("xhcbyagfde"), tuple("bca")])
def test_it_is_the_heads_first_class_matched_by_name(
    names: tuple[str, ...], unit: bool, saved: Callable[..., Path], tmp_path: Path
) -> None:
    file = saved(names, unit=unit)
    found = PROTOCOLS.build(spec(file))(BARE, LABELLED, tmp_path)
    check(file, LABELLED, found.metrics, found.arrays)
    assert ("top5" in found.metrics) == (len(names) > 5)


def test_images_of_a_class_that_the_head_does_not_know_are_errors_and_it_is_said_once(
    saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = PROTOCOLS.build(spec(saved(NAMES[:6])))(BARE, LABELLED, tmp_path)
    lost = int((LABELLED.label >= 6).sum())
    assert found.metrics["unknown"] == lost and found.metrics["top5"] < 100 * (1 - lost / N) + 1e-9
    assert found.arrays["per_class"][6:].tolist() == [0, 0]
    err = " ".join(capsys.readouterr().err.split())
    assert err.count("count as errors") == 1 and f"{lost} of {N} validation images" in err and "'g'" in err


def test_a_head_without_names_has_the_order_of_the_images_classes(saved: Callable[..., Path], tmp_path: Path) -> None:
    file = saved(None, classes=len(NAMES))
    found = PROTOCOLS.build(spec(file))(BARE, LABELLED, tmp_path)
    check(file, LABELLED, found.metrics, found.arrays)
    with pytest.raises(UserError, match=r"has 7 classes without names, and the images have 8; give images"):
        PROTOCOLS.build(spec(saved(None, classes=7)))(BARE, LABELLED, tmp_path)


def test_of_equal_logits_the_first_wins(tmp_path: Path) -> None:
    linear_head.save(LinearHead(torch.zeros(8, WIDTH), torch.zeros(8), NAMES), tmp_path / "head")
    found = PROTOCOLS.build(spec(tmp_path / "head"))(BARE, LABELLED, tmp_path)
    assert set(found.arrays["prediction"]) == {0}
    assert found.metrics["top5"] == pytest.approx(100 * np.mean(LABELLED.label < 5))


def test_what_it_cannot_score_is_refused_in_words(saved: Callable[..., Path], tmp_path: Path) -> None:
    strange = PROTOCOLS.build(spec(saved(("x", "y"))))
    with pytest.raises(UserError, match=r"has none of the 8 classes .* its first is 'x', theirs 'a'; give a head for"):
        strange(BARE, LABELLED, tmp_path)
    wide = PROTOCOLS.build(spec(saved(width=WIDTH + 1)))
    with pytest.raises(UserError, match=r"of 7 dimensions, and this model's have 6; give the head of this very model"):
        wide(BARE, LABELLED, tmp_path)
    unlabelled = images(np.full(4, -1))
    with pytest.raises(UserError, match="needs labels, but 4 of 4 validation images have none"):
        PROTOCOLS.build(spec(saved()))(LABELLED, unlabelled, tmp_path)


def damage(kind: str, whole: bytes, file: Path) -> None:
    good = safetensors.torch.load(whole)
    said = {"classes": json.dumps(NAMES), "unit": "false"}
    parts: dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]] = {
        "of the names": (good, {}),
        "of the weight": ({"bias": good["bias"]}, said),
        "of a bias": ({"weight": good["weight"], "bias": good["bias"][:2].clone()}, said),
        "of a name": (good, {"classes": json.dumps(NAMES[1:])}),
        "of finite numbers": ({"weight": good["weight"] / 0, "bias": good["bias"]}, said),
    }
    if kind == "of anything":
        return
    if kind == "of all but a folder":
        return file.mkdir()
    if kind in parts:
        safetensors.torch.save_file(parts[kind][0], file, parts[kind][1])
    else:
        file.write_bytes(whole[:-3] if kind == "of its end" else b"no head at all")


@pytest.mark.parametrize(
    ("lack", "words"),
    [
        ("of anything", "No such file"),
        ("of all but a folder", "it is a folder"),
        ("of its end", "[Hh]eader"),
        ("of sense", "[Hh]eader"),
        ("of the names", "it says nothing of classes"),
        ("of the weight", "weight"),
        ("of a bias", r"shapes \(\(8, 6\), \(2,\)\)"),
        ("of a name", "7 names for 8 classes"),
        ("of finite numbers", "its numbers are not finite"),
    ],
)
def test_a_file_that_is_no_head_is_refused_when_it_is_named(
    lack: str, words: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    whole = saved().read_bytes()
    damage(lack, whole, tmp_path / "other")
    with pytest.raises(UserError, match=rf"other is no linear head \(.*{words}.*\); make one with compress label-head"):
        PROTOCOLS.build(spec(tmp_path / "other"))


def test_a_head_must_be_named_and_its_digest_cannot_be() -> None:
    with pytest.raises(UserError, match="protocol 'classifier' needs head="):
        PROTOCOLS.build("classifier")
    with pytest.raises(UserError, match="has no key 'digest'"):
        PROTOCOLS.build("classifier:head=a,digest=b")
    assert "    head=...\n" in menus.run(menus.Protocols())["summary"] + "\n"


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 200 digits, a head on 20 % of its labels, and a student of that head."""
    top = tmp_path_factory.mktemp("classifier")
    how: dict[str, Any] = {"image_size": 8, "workers": 0, "device": "cpu"}
    teacher = "convnet:channels=8+16,pretrained=false"
    export_teacher.run(export_teacher.Config("digits", teacher, top / "store", views=3, limit=200, **how))
    label_head.run(label_head.Config(store=str(top / "store"), out=top / "head.safetensors", labels="20%"))
    method = f"simclr-v2:head={top / 'head.safetensors'}"
    learns: dict[str, Any] = {"optimizer": "sgd", "lr": 0.5, "batch_size": 20, "epochs": 8, "warmup_epochs": 0.0}
    student = ("convnet:channels=8+12",)
    distill.run(
        distill.Config(store=str(top / "store"), student=student, method=method, out=top / "run", **learns, **how)
    )
    return top


def scored(out: Path, *protocols: str, **who: Any) -> dict[str, Any]:
    config = evaluate.Config(val=VAL, out=out, protocol=protocols, workers=0, device="cpu", **who)
    return evaluate.run(config)["metrics"]


@pytest.mark.parametrize(
    ("who", "head"), [({"run": "run"}, "run/head.safetensors"), ({"store": "store"}, "head.safetensors")]
)
def test_a_students_classifier_and_a_teachers_head_score_as_the_bare_numbers_do(
    who: dict[str, str], head: str, made: Path, tmp_path: Path
) -> None:
    subject = {key: made / name if key == "run" else str(made / name) for key, name in who.items()}
    metrics = scored(tmp_path / "out", spec(made / head), **subject)
    seen = FeatureStore(Folder(tmp_path / "out/features/val"))
    val = Split(seen.read("embedding", 0), seen.table("label"), np.arange(seen.images), tuple("0123456789"))
    (arrays,) = (tmp_path / "out/results").glob("classifier-*.npz")
    check(made / head, val, metrics["classifier"], dict(np.load(arrays)))
    assert metrics["classifier"]["top1"] > 25  # of ten classes: it did learn
    assert headline_scores(metrics) == {
        "Classifier": metrics["classifier"]["top1"], "Classifier top-5": metrics["classifier"]["top5"]
    }  # fmt: skip
    page = (tmp_path / "out/report.html").read_text()
    assert "Classifier top-5" in page and "top-1 of a classifier that was there already" in page


def test_training_images_without_labels_will_do(made: Path, tmp_path: Path) -> None:
    from PIL import Image

    from compress_ssl.pipeline.datasets import DATASETS

    digits = DATASETS.build(VAL)
    for i in range(4):
        for folder in ("flat", f"val/{digits.classes[digits.label[i]]}"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(digits.load(i)[0]).save(tmp_path / folder / f"{i}.png")
    who = {"run": made / "run", "train": str(tmp_path / "flat"), "out": tmp_path / "out", "val": str(tmp_path / "val")}
    config = evaluate.Config(**who, protocol=(spec(made / "run/head.safetensors"),), workers=0, device="cpu")
    assert 0 <= evaluate.run(config)["metrics"]["classifier"]["top1"] <= 100
    with pytest.raises(UserError, match="training images have none"):
        evaluate.run(evaluate.Config(**who, protocol=("nn",), workers=0, device="cpu"))


def test_a_result_is_kept_and_not_taken_for_that_of_another_file(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, calls = PROTOCOLS.resolve("classifier"), []
    whole = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda *said: (calls.append(1), whole(*said))[1])
    file, who = tmp_path / "head.safetensors", {"run": made / "run"}
    file.write_bytes((made / "run/head.safetensors").read_bytes())
    first = scored(tmp_path / "out", spec(file), **who)["classifier"]
    assert scored(tmp_path / "out", spec(file), **who)["classifier"] == first and len(calls) == 1
    head = linear_head.load(file)
    linear_head.save(LinearHead(-head.weight, -head.bias, head.names, unit=False), file)
    second = scored(tmp_path / "out", spec(file), **who)["classifier"]
    assert len(calls) == 2 and second["top1"] < first["top1"]
    later = scored(tmp_path / "out", "nn", **who)  # nor does the old one come back
    assert later["classifier"] == second and "nn" in later


def test_a_missing_head_is_refused_before_anything_is_made(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no linear head"):
        scored(tmp_path / "out", "nn", spec(tmp_path / "none"), run=made / "run")
    assert not (tmp_path / "out").exists()


def test_the_head_of_another_model_is_refused_before_anything_is_made(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"was made for another model than convnet; give the head of this one"):
        scored(tmp_path / "out", spec(made / "head.safetensors"), run=made / "run")
    assert not (tmp_path / "out").exists()


def test_a_result_cut_short_by_a_crash_is_never_that_of_the_head_before(
    saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = Results(Folder(tmp_path))
    one = PROTOCOLS.build(spec(saved()))
    results.put(one, "one", one(BARE, LABELLED, tmp_path))
    other, put = PROTOCOLS.build(spec(saved(seed=2))), Folder.put
    assert results.get(one) is not None and results.get(other) is None

    def crash(folder: Folder, key: str, data: bytes) -> None:
        if key.endswith(".json"):
            raise KeyboardInterrupt
        put(folder, key, data)

    monkeypatch.setattr(Folder, "put", crash)
    with pytest.raises(KeyboardInterrupt):
        results.put(other, "other", other(BARE, LABELLED, tmp_path))
    assert results.get(one) is None and results.get(other) is None
