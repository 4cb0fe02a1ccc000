"""`classifier:head=FILE` scores a student's own classifier or a head of compress label-head without training."""

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
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.stages import distill, evaluate, export_teacher, label_head, listing

pytestmark = pytest.mark.usefixtures("one_thread")

N, WIDTH = 50, 6
NAMES = tuple("abcdefgh")
VAL = "digits:split=test"


def spec(file: Path) -> str:
    return f"classifier:head={file}"


def images(label: np.ndarray, classes: tuple[str, ...] = NAMES, seed: int = 0) -> Split:
    """A split of random features with these labels."""
    features = np.random.default_rng(seed).normal(size=(len(label), WIDTH)).astype(np.float32)
    return Split(features * 5, label.astype(np.int64), np.arange(len(label)), classes)


UNLABELLED = images(np.full(3, -1), ())
LABELLED = images(np.arange(N) % len(NAMES))


@pytest.fixture
def write_head(tmp_path: Path) -> Callable[..., Path]:
    """write_head(names, unit=..., width=...) writes a head of random numbers and returns its path."""

    def write(names: Any = NAMES, *, classes: int = 0, unit: bool = False, width: int = WIDTH, seed: int = 1) -> Path:
        draw, count = torch.Generator().manual_seed(seed), classes or len(names)
        head = LinearHead(
            torch.randn(count, width, generator=draw), torch.randn(count, generator=draw), names, unit=unit
        )
        linear_head.save(head, tmp_path / "head.safetensors")
        return tmp_path / "head.safetensors"

    return write


def rank_slowly(features: np.ndarray, weight: np.ndarray, bias: np.ndarray, unit: bool) -> list[list[int]]:
    """The classes of each row in descending order of their logits, computed one number at a time."""
    out = []
    for f in features.astype(np.float64):
        f = f / np.sqrt(sum(x * x for x in f)) if unit else f
        logits = [sum(w * x for w, x in zip(row, f, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
        out.append(sorted(range(len(logits)), key=lambda c: -logits[c]))
    return out


def assert_scores_match(file: Path, val: Split, metrics: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Compare metrics and arrays with a slow computation from the tensors in the file."""
    head = linear_head.load(file)
    tensors, names = safetensors.torch.load_file(file), head.names or val.classes
    order = rank_slowly(val.features, tensors["weight"].double().numpy(), tensors["bias"].double().numpy(), head.unit)
    ranked = [[names[c] for c in row] for row in order]
    true = [val.classes[y] for y in val.label]
    pairs = list(zip(ranked, true, strict=True))
    assert metrics["top1"] == pytest.approx(100 * sum(r[0] == t for r, t in pairs) / len(pairs))
    if len(names) > 5:
        assert metrics["top5"] == pytest.approx(100 * sum(t in r[:5] for r, t in pairs) / len(pairs))
    each = {c: [r[0] == c for r, t in pairs if t == c] for c in set(true)}
    assert metrics["mean_per_class"] == pytest.approx(100 * np.mean([np.mean(hits) for hits in each.values()]))
    predicted = [None if p < 0 else val.classes[p] for p in arrays["prediction"]]
    assert predicted == [r[0] if r[0] in val.classes else None for r in ranked]


# ---------------------------------------------------------------- the protocol


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("names", [NAMES, tuple("hcbagfde"), tuple("xhcbyagfde"), tuple("bca")])
def test_a_prediction_is_the_heads_first_class_matched_with_the_images_by_name(
    names: tuple[str, ...], unit: bool, write_head: Callable[..., Path], tmp_path: Path
) -> None:
    file = write_head(names, unit=unit)
    found = PROTOCOLS.build(spec(file))(UNLABELLED, LABELLED, tmp_path)
    assert_scores_match(file, LABELLED, found.metrics, found.arrays)
    assert ("top5" in found.metrics) == (len(names) > 5)


def test_images_of_a_class_that_the_head_lacks_are_errors_and_are_reported_once(
    write_head: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = PROTOCOLS.build(spec(write_head(NAMES[:6])))(UNLABELLED, LABELLED, tmp_path)
    lost = int((LABELLED.label >= 6).sum())
    assert found.metrics["unknown"] == lost and found.metrics["top5"] < 100 * (1 - lost / N) + 1e-9
    assert found.arrays["per_class"][6:].tolist() == [0, 0]
    err = " ".join(capsys.readouterr().err.split())
    assert err.count("count as errors") == 1 and f"{lost} of {N} validation images" in err and "'g'" in err


def test_a_head_without_names_is_taken_in_the_order_of_the_images_classes(
    write_head: Callable[..., Path], tmp_path: Path
) -> None:
    file = write_head(None, classes=len(NAMES))
    found = PROTOCOLS.build(spec(file))(UNLABELLED, LABELLED, tmp_path)
    assert_scores_match(file, LABELLED, found.metrics, found.arrays)
    with pytest.raises(UserError, match=r"has 7 classes without names, and the images have 8; give images"):
        PROTOCOLS.build(spec(write_head(None, classes=7)))(UNLABELLED, LABELLED, tmp_path)


def test_of_equal_logits_the_first_class_is_predicted(tmp_path: Path) -> None:
    linear_head.save(LinearHead(torch.zeros(8, WIDTH), torch.zeros(8), NAMES), tmp_path / "head")
    found = PROTOCOLS.build(spec(tmp_path / "head"))(UNLABELLED, LABELLED, tmp_path)
    assert set(found.arrays["prediction"]) == {0}
    assert found.metrics["top5"] == pytest.approx(100 * np.mean(LABELLED.label < 5))


def test_other_classes_another_width_and_missing_labels_are_refused(
    write_head: Callable[..., Path], tmp_path: Path
) -> None:
    other_classes = PROTOCOLS.build(spec(write_head(("x", "y"))))
    with pytest.raises(UserError, match=r"has none of the 8 classes .* its first is 'x', theirs 'a'; give a head for"):
        other_classes(UNLABELLED, LABELLED, tmp_path)
    too_wide = PROTOCOLS.build(spec(write_head(width=WIDTH + 1)))
    with pytest.raises(UserError, match=r"of 7 dimensions, and this model's have 6; give the head of this model"):
        too_wide(UNLABELLED, LABELLED, tmp_path)
    unlabelled = images(np.full(4, -1))
    with pytest.raises(UserError, match="needs labels, but 4 of 4 validation images have none"):
        PROTOCOLS.build(spec(write_head()))(LABELLED, unlabelled, tmp_path)


def damage(kind: str, whole: bytes, file: Path) -> None:
    """Write to `file` what is left of a whole head file, damaged in one of the ways below."""
    good = safetensors.torch.load(whole)
    metadata = {"classes": json.dumps(NAMES), "unit": "false"}
    parts: dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]] = {
        "no names": (good, {}),
        "no weight": ({"bias": good["bias"]}, metadata),
        "short bias": ({"weight": good["weight"], "bias": good["bias"][:2].clone()}, metadata),
        "a name too few": (good, {"classes": json.dumps(NAMES[1:])}),
        "not finite": ({"weight": good["weight"] / 0, "bias": good["bias"]}, metadata),
    }
    if kind == "no file":
        return
    if kind == "a folder":
        return file.mkdir()
    if kind in parts:
        safetensors.torch.save_file(parts[kind][0], file, parts[kind][1])
    else:
        file.write_bytes(whole[:-3] if kind == "cut short" else b"no head at all")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no file", "No such file"),
        ("a folder", "it is a folder"),
        ("cut short", "[Hh]eader"),
        ("text", "[Hh]eader"),
        ("no names", "its metadata has no classes"),
        ("no weight", "weight"),
        ("short bias", r"shapes \(\(8, 6\), \(2,\)\)"),
        ("a name too few", "7 names for 8 classes"),
        ("not finite", "its numbers are not finite"),
    ],
)
def test_a_file_that_is_not_a_head_is_refused_when_the_protocol_is_built(
    kind: str, message: str, write_head: Callable[..., Path], tmp_path: Path
) -> None:
    whole = write_head().read_bytes()
    damage(kind, whole, tmp_path / "other")
    with pytest.raises(
        UserError, match=rf"other is no linear head \(.*{message}.*\); make one with compress label-head"
    ):
        PROTOCOLS.build(spec(tmp_path / "other"))


def test_the_option_head_is_required_and_its_digest_is_no_option() -> None:
    with pytest.raises(UserError, match="protocol 'classifier' needs head="):
        PROTOCOLS.build("classifier")
    with pytest.raises(UserError, match="has no key 'digest'"):
        PROTOCOLS.build("classifier:head=a,digest=b")
    assert "    head=...\n" in listing.run(listing.Protocols())["summary"] + "\n"


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 200 digits, a head fitted to 20 % of its labels, and a student trained with that head."""
    folder = tmp_path_factory.mktemp("classifier")
    options: dict[str, Any] = {"image_size": 8, "workers": 0, "device": "cpu"}
    teacher = "convnet:channels=8+16,pretrained=false"
    export_teacher.run(export_teacher.Config("digits", teacher, folder / "store", views=3, limit=200, **options))
    label_head.run(label_head.Config(store=str(folder / "store"), out=folder / "head.safetensors", labels="20%"))
    method = f"simclr-v2:head={folder / 'head.safetensors'}"
    training: dict[str, Any] = {"optimizer": "sgd", "lr": 0.5, "batch_size": 20, "epochs": 8, "warmup_epochs": 0.0}
    student = ("convnet:channels=8+12",)
    distill.run(
        distill.Config(
            store=str(folder / "store"), student=student, method=method, out=folder / "run", **training, **options
        )
    )
    return folder


def evaluate_model(out: Path, *protocols: str, **model: Any) -> dict[str, Any]:
    """metrics.json of the model that --run or --store names."""
    config = evaluate.Config(val=VAL, out=out, protocol=protocols, workers=0, device="cpu", **model)
    return evaluate.run(config)["metrics"]


@pytest.mark.parametrize(
    ("model", "head"), [({"run": "run"}, "run/head.safetensors"), ({"store": "store"}, "head.safetensors")]
)
def test_the_command_scores_a_students_classifier_and_a_teachers_head_as_the_slow_computation_does(
    model: dict[str, str], head: str, made: Path, tmp_path: Path
) -> None:
    paths = {key: made / name if key == "run" else str(made / name) for key, name in model.items()}
    metrics = evaluate_model(tmp_path / "out", spec(made / head), **paths)
    features = FeatureStore(Folder(tmp_path / "out/features/val"))
    val = Split(features.read("embedding", 0), features.table("label"), np.arange(features.images), tuple("0123456789"))
    (arrays,) = (tmp_path / "out/results").glob("classifier-*.npz")
    assert_scores_match(made / head, val, metrics["classifier"], dict(np.load(arrays)))
    assert metrics["classifier"]["top1"] > 25  # of ten classes: well above chance
    assert {score["title"]: score["value"] for score in metrics["scores"]} == {
        "Classifier": metrics["classifier"]["top1"], "Classifier top-5": metrics["classifier"]["top5"]
    }  # fmt: skip
    page = (tmp_path / "out/report.html").read_text()
    assert "Classifier top-5" in page and "top-1 of a classifier that was there already" in page


def test_training_images_need_no_labels(made: Path, tmp_path: Path) -> None:
    from PIL import Image

    from compress_ssl.pipeline.datasets import DATASETS

    digits = DATASETS.build(VAL)
    for i in range(4):
        for folder in ("flat", f"val/{digits.classes[digits.label[i]]}"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(digits.load(i)[0]).save(tmp_path / folder / f"{i}.png")
    flags = {
        "run": made / "run",
        "train": str(tmp_path / "flat"),
        "out": tmp_path / "out",
        "val": str(tmp_path / "val"),
    }
    config = evaluate.Config(**flags, protocol=(spec(made / "run/head.safetensors"),), workers=0, device="cpu")
    assert 0 <= evaluate.run(config)["metrics"]["classifier"]["top1"] <= 100
    with pytest.raises(UserError, match="training images have none"):
        evaluate.run(evaluate.Config(**flags, protocol=("nn",), workers=0, device="cpu"))


def test_folders_may_be_given_as_strings_from_python(made: Path, tmp_path: Path) -> None:
    as_strings: dict[str, Any] = {"run": str(made / "run"), "teacher": str(tmp_path / "first")}
    evaluate_model(tmp_path / "first", "nn", run=made / "run")
    made_from_strings: Any = evaluate_model(str(tmp_path / "second"), "nn", **as_strings)  # type: ignore[arg-type]
    assert made_from_strings["nn"] == json.loads((tmp_path / "first/metrics.json").read_text())["nn"]


def test_a_result_is_reused_only_for_a_head_of_the_same_content(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, calls = PROTOCOLS.resolve("classifier"), []
    original = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda *arguments: (calls.append(1), original(*arguments))[1])
    file, model = tmp_path / "head.safetensors", {"run": made / "run"}
    file.write_bytes((made / "run/head.safetensors").read_bytes())
    first = evaluate_model(tmp_path / "out", spec(file), **model)["classifier"]
    assert evaluate_model(tmp_path / "out", spec(file), **model)["classifier"] == first and len(calls) == 1
    head = linear_head.load(file)
    linear_head.save(LinearHead(-head.weight, -head.bias, head.names, unit=False), file)
    second = evaluate_model(tmp_path / "out", spec(file), **model)["classifier"]
    assert len(calls) == 2 and second["top1"] < first["top1"]
    later = evaluate_model(tmp_path / "out", "nn", **model)  # the first head's result does not come back
    assert later["classifier"] == second and "nn" in later


def test_a_missing_head_is_refused_before_anything_is_written(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no linear head"):
        evaluate_model(tmp_path / "out", "nn", spec(tmp_path / "none"), run=made / "run")
    assert not (tmp_path / "out").exists()


def test_the_head_of_another_model_is_refused_before_anything_is_written(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"was made for another model than convnet; give the head of this one"):
        evaluate_model(tmp_path / "out", spec(made / "head.safetensors"), run=made / "run")
    assert not (tmp_path / "out").exists()


def test_after_a_crash_the_result_of_an_earlier_head_is_not_taken_for_a_later_one(
    write_head: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = Results(Folder(tmp_path), UNLABELLED, LABELLED)
    first = PROTOCOLS.build(spec(write_head()))
    results.put(first, "first", first(UNLABELLED, LABELLED, tmp_path))
    second, put = PROTOCOLS.build(spec(write_head(seed=2))), Folder.put
    assert results.get(first) is not None and results.get(second) is None

    def crash(folder: Folder, key: str, data: bytes) -> None:
        if key.endswith(".json"):
            raise KeyboardInterrupt
        put(folder, key, data)

    monkeypatch.setattr(Folder, "put", crash)
    with pytest.raises(KeyboardInterrupt):
        results.put(second, "second", second(UNLABELLED, LABELLED, tmp_path))
    assert results.get(first) is None and results.get(second) is None
