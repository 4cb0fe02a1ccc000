"""Stored features are those of the teacher on the right pixels, with the same bytes however the export was run."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from compress_ssl.pipeline.datasets.base import content_hash
from compress_ssl.pipeline.datasets.decode import BROKEN, NOT_AN_IMAGE, NOT_FINITE, decode
from compress_ssl.pipeline.datasets.folder import Folder as ImageFolder
from compress_ssl.pipeline.extraction.embed import embed, store_source
from compress_ssl.pipeline.extraction.extract import LoaderSettings
from compress_ssl.pipeline.extraction.feature_extractor import FeatureExtractor
from compress_ssl.pipeline.extraction.store_record import describe_store
from compress_ssl.pipeline.models import build
from compress_ssl.pipeline.runtime.artifact import Mismatch
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.records import to_json
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.codecs import CODECS
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.views.augment import ViewSpec, draw_variates, resolve_view
from compress_ssl.pipeline.views.render import render_view
from compress_ssl.stages import export_teacher
from compress_ssl.stages.export_teacher import Config

ROOT = Path(__file__).parents[1]
TEACHER = "convnet:channels=4+8,pretrained=false"
SIZE, WIDTH = 16, 8
SHAPES = [
    (20, 31),
    (48, 17),
    (16, 16),
    (33, 90),
    (7, 5),
    (64, 64),
    (25, 24),
    (90, 30),
    (1, 40),
    (41, 41),
]  # height, width


def paint(root: Path, count: int, seed: int = 0) -> Path:
    """JPEG files of different sizes in three classes, smooth and different from each other."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        height, width = SHAPES[i % len(SHAPES)]
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        file = root / f"{'abc'[i % 3]}/{i:03d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        small.save(file, quality=92)
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 images: two shards of 16 rows and a third one of 5."""
    return paint(tmp_path_factory.mktemp("images"), 37)


pytestmark = pytest.mark.usefixtures("one_thread")


def config(data: Path | str, out: Path, **changes: Any) -> Config:
    settings = {"teacher": TEACHER, "views": 5, "image_size": SIZE, "batch_size": 8, "shard_size": 16, "workers": 0}
    return Config(data=str(data), out=out, **{**settings, "device": "cpu", **changes})


def export(data: Path | str, out: Path, **changes: Any) -> FeatureStore:
    export_teacher.run(config(data, out, **changes))
    return FeatureStore(Folder(out))


def tree(store: Path, *tops: str) -> dict[str, bytes]:
    """{file: content} of everything that must be the same bytes: all but the history."""
    files = {str(file.relative_to(store)): file.read_bytes() for file in store.rglob("*") if file.is_file()}
    return {name: data for name, data in files.items() if name != "history.jsonl" and name.startswith(tops or "")}


def expected(data: Path, spec: ViewSpec, v: int, row: int, key: int | None = None) -> np.ndarray:
    """(D,) float32: the teacher on view v of one image, computed step by step without batch, store or loader."""
    torch.manual_seed(0)
    model = build(TEACHER, image_size=SIZE, pretrained_default=True)
    name = sorted(file.relative_to(data).as_posix() for file in data.rglob("*.jpg"))[row]
    image = torch.from_numpy(decode((data / name).read_bytes())).permute(2, 0, 1)
    if v == 0:
        resize = v2.Resize(int(SIZE / spec.crop_ratio), antialias=True)
        pixels = v2.Compose([resize, v2.CenterCrop(SIZE)])(image)
    else:
        view = resolve_view(
            spec, draw_variates(spec.seed, row if key is None else key, v), v, image.shape[1], image.shape[2]
        )
        pixels = render_view(image, view, SIZE, "bilinear")
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        return model.eval().backbone(((pixels.float() / 255 - mean) / std)[None])[0].numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


# ---------------------------------------------------------------- the right features


@pytest.mark.parametrize("policy", ["crop-flip", "moco-v2", "dino"])
def test_stored_features_are_those_of_the_teacher_on_the_right_view_and_image(
    images: Path, tmp_path: Path, policy: str
) -> None:
    exact = export(images, tmp_path / "exact", codec="float32", policy=policy, seed=5)
    spec = ViewSpec(policy, 5, exact.identity.views.crop_ratio)
    rows = [0, 8, 15, 16, 23, 31, 32, 36]  # at the borders of batches and shards, and in the last, smaller shard
    right = np.array([[expected(images, spec, v, i) for v in range(5)] for i in rows])
    stored = np.stack([exact.read("embedding", v)[rows] for v in range(5)], 1)
    assert np.abs(stored - right).max() < 1e-5 * np.abs(right).max()
    for v, other in itertools.permutations(range(5), 2):
        difference = np.abs(stored[:, v] - right[:, other]).max(-1) / np.abs(right[:, v]).max(-1)
        assert np.median(difference) > 0.03
    wrong_row = np.abs(stored - np.roll(right, 1, 0)).max(-1)
    assert np.median(wrong_row / np.abs(right).max(-1)) > 0.1


@pytest.mark.parametrize("codec", ["int8", "float16", "float16+zstd"])
def test_smaller_codecs_keep_the_direction_of_features(images: Path, tmp_path: Path, codec: str) -> None:
    small, exact = (export(images, tmp_path / name, codec=name) for name in (codec, "float32"))
    for v in range(5):
        assert cosine(small.read("embedding", v), exact.read("embedding", v)).min() > 0.9999


def test_another_seed_changes_the_random_views_and_not_view_0(images: Path, tmp_path: Path) -> None:
    one, two = (export(images, tmp_path / str(seed), codec="float32", views=2, seed=seed) for seed in (0, 1))
    assert np.array_equal(one.read("embedding", 0), two.read("embedding", 0))
    same = np.isclose(one.read("embedding", 1), two.read("embedding", 1)).all(1)
    assert same.mean() < 0.15  # two crops of an image of 5 x 7 pixels are often the same


def test_ids_labels_view_keys_and_content_hashes_are_those_of_the_files(images: Path, tmp_path: Path) -> None:
    store = export(images, tmp_path / "store", views=1)
    names = sorted(str(file.relative_to(images)) for file in images.rglob("*.jpg"))
    assert store.table("sample_id").tolist() == names
    assert [store.about.classes[y] for y in store.table("label")] == [name[0] for name in names]
    assert store.table("view_key").tolist() == list(range(37))
    assert store.table("content").tolist() == [content_hash((images / name).read_bytes()) for name in names]


def test_the_manifest_records_data_teacher_views_and_codec(images: Path, tmp_path: Path) -> None:
    manifest = json.loads(export(images, tmp_path / "store", policy="dino", seed=3).storage.get("manifest.json"))
    torch.manual_seed(0)
    teacher = build(TEACHER, image_size=SIZE, pretrained_default=True)
    assert manifest["identity"] == {
        "data": {"fingerprint": ImageFolder(images).fingerprint, "images": 37},
        "teacher": {
            "name": "convnet",
            "weights": teacher.digest(),
            "width": WIDTH,
            "preprocessing": to_json(teacher.preprocessing),
        },
        "views": {"policy": "dino", "seed": 3, "crop_ratio": 1.0},
        "arrays": {"embedding": [WIDTH]},
        "codec": "int8",
        "batch_size": 8,
        "precision": "fp32",
        "shard_rows": 16,
    }
    assert manifest["about"]["data"] == {"spec": f"folder:{images}", "limit": None}
    assert manifest["about"]["teacher"] == TEACHER
    assert manifest["about"]["classes"] == ["a", "b", "c"]


def test_a_limit_takes_evenly_spread_images(images: Path, tmp_path: Path) -> None:
    store = export(images, tmp_path / "store", views=1, limit=10)
    names = sorted(str(file.relative_to(images)) for file in images.rglob("*.jpg"))
    assert store.table("sample_id").tolist() == [names[i] for i in (0, 4, 8, 12, 16, 20, 24, 28, 32, 36)]


def test_the_built_in_digits_can_be_exported(tmp_path: Path) -> None:
    store = export("digits", tmp_path / "store", views=2, limit=20, codec="float32")
    assert store.table("sample_id")[0] == "digits/0000"
    assert store.export.classes == tuple(str(d) for d in range(10))
    assert np.isfinite(store.read("embedding", 1)).all() and store.read("embedding", 1).std() > 0


def test_each_image_is_decoded_once_for_all_its_views(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[int] = []
    load = ImageFolder.load
    monkeypatch.setattr(ImageFolder, "load", lambda self, i: (loads.append(i), load(self, i))[1])
    export(images, tmp_path / "store", views=6)
    probes = [0, 18, 36]
    assert sorted(loads) == sorted([*range(37), *probes])


# ---------------------------------------------------------------- the same bytes, however the export is run


def by_embed(
    images: Path,
    out: Path,
    first_key: int = 0,
    codec: str = "int8",
    workers: int = 0,
    threads: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> FeatureStore:
    """An export by calling `embed`, with settings for which the command has no flag."""
    settings = config(images, out, codec=codec)
    torch.manual_seed(0)
    model = build(TEACHER, image_size=SIZE, pretrained_default=True)
    dataset = ImageFolder(images)
    record = describe_store(export_teacher.resolve(settings), model)
    keys = np.arange(len(dataset), dtype=np.uint64) + np.uint64(first_key)
    tables = {"sample_id": dataset.ids, "label": dataset.label, "view_key": keys}
    store = FeatureStore.create(Folder(out), record, tables)
    forward = FeatureExtractor(model, torch.device("cpu"), "fp32", settings.batch_size)
    loader = LoaderSettings(workers, threads)
    embed(store, store_source(store, dataset, forward, loader), store.pending(), stopped=stopped)
    return store


def stop_after(count: int) -> Callable[[], bool]:
    """A function for `stopped`, which is called once per batch: it returns true from call number `count` on."""
    calls = itertools.count()
    return lambda: next(calls) >= count


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an export in one process that was not interrupted."""
    out = tmp_path_factory.mktemp("whole") / "store"
    export(images, out)
    return tree(out)


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_processes_change_no_byte(images: Path, tmp_path: Path, whole: dict[str, bytes], workers: int) -> None:
    export(images, tmp_path / "store", workers=workers)
    assert tree(tmp_path / "store") == whole


@pytest.mark.parametrize("workers", [1, 3])
def test_loader_threads_change_no_byte(images: Path, tmp_path: Path, whole: dict[str, bytes], workers: int) -> None:
    by_embed(images, tmp_path / "store", workers=workers, threads=True)
    assert tree(tmp_path / "store") == whole


@pytest.mark.parametrize("stops", [(0,), (1,), (2, 2), (1, 3, 0, 2)], ids=str)
def test_stopping_between_batches_changes_no_byte(
    images: Path, tmp_path: Path, whole: dict[str, bytes], stops: tuple[int, ...]
) -> None:
    for count in stops:
        by_embed(images, tmp_path / "store", stopped=stop_after(count))
    assert FeatureStore(Folder(tmp_path / "store")).pending()
    export(images, tmp_path / "store")
    assert tree(tmp_path / "store") == whole


@pytest.mark.parametrize("stops", [(), (3, 1)], ids=str)
def test_fetching_a_batch_while_the_next_is_computed_changes_no_byte(
    images: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, stops: tuple[int, ...]
) -> None:
    """As on a GPU, whose outputs are fetched one batch late."""
    monkeypatch.setattr(FeatureExtractor, "batches_ahead", 1)
    for count in stops:
        by_embed(images, tmp_path / "store", stopped=stop_after(count))
    export(images, tmp_path / "store")
    assert tree(tmp_path / "store") == whole


def test_views_are_drawn_from_the_stored_keys_and_not_from_row_numbers(images: Path, tmp_path: Path) -> None:
    store = by_embed(images, tmp_path / "store", first_key=2**40, codec="float32")
    right = expected(images, ViewSpec("crop-flip", 0, 1.0), 3, 10, 2**40 + 10)
    assert np.abs(store.read("embedding", 3)[10] - right).max() < 1e-5 * np.abs(right).max()


def test_a_relative_path_of_the_images_changes_no_byte(
    images: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: Any
) -> None:
    monkeypatch.chdir(images.parent)
    by_embed(Path(images.name), tmp_path / "store")
    differing = {name for name, data in tree(tmp_path / "store").items() if data != whole[name]}
    assert differing == set()


@pytest.mark.parametrize("codec", [*CODECS, "int8+zstd", "pq:4"])
def test_a_store_to_which_views_are_added_has_the_bytes_of_one_made_at_once(
    images: Path, tmp_path: Path, codec: str
) -> None:
    for views in (3, 5, 8):
        export(images, tmp_path / "grown", views=views, codec=codec, policy="moco-v2")
    export(images, tmp_path / "fresh", views=8, codec=codec, policy="moco-v2")
    assert tree(tmp_path / "grown") == tree(tmp_path / "fresh")


def test_the_same_command_again_computes_and_writes_nothing(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(images, tmp_path / "store")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "store").rglob("*")}
    monkeypatch.setattr(FeatureExtractor, "start", lambda *_: pytest.fail("a forward pass was run"))
    made = export_teacher.run(config(images, tmp_path / "store"))
    assert made["summary"] == f"{tmp_path / 'store'} is complete already: 37 images, 5 views"
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "store").rglob("*")} == before


@pytest.mark.parametrize("lost", [["0000001.0000-0004"], ["0000002.0004-0005", "0000000.0000-0004"]], ids=len)
def test_only_what_is_pending_is_computed(
    images: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, lost: list[str]
) -> None:
    out = tmp_path / "store"
    export(images, out)
    for name in lost:
        (out / f"done/{name}.json").unlink()
    calls: list[int] = []
    call = FeatureExtractor.start
    monkeypatch.setattr(FeatureExtractor, "start", lambda self, *x: (calls.append(len(x[0])), call(self, *x))[1])
    export(images, out)
    views = {name: int(name[-4:]) - int(name[-9:-5]) for name in lost}
    rows = {"0000000": [8, 8], "0000001": [8, 8], "0000002": [5]}
    assert sorted(calls) == sorted(n for name in lost for n in rows[name[:7]] * views[name])
    assert tree(out) == whole


def test_a_store_made_with_other_settings_is_refused_before_anything_is_computed(images: Path, tmp_path: Path) -> None:
    export(images, tmp_path / "store", views=1)
    for change, message in (
        ({"batch_size": 4}, "batch_size is 8 there, 4 asked"),
        ({"seed": 1}, "views.seed is 0 there, 1 asked"),
        ({"precision": "bf16"}, "precision is"),
        ({"codec": "float16"}, "codec is"),
        ({"policy": "dino"}, "views.policy is"),
        ({"teacher": "convnet:channels=4+4,pretrained=false"}, "teacher.weights is"),
        ({"image_size": 24}, "teacher.preprocessing.size is 16 there, 24 asked"),
    ):
        with pytest.raises(Mismatch, match=message):
            export(images, tmp_path / "store", views=1, **change)
    with pytest.raises(UserError, match="was made from other images"):
        export(images, tmp_path / "store", views=1, limit=10)


def test_a_changed_image_is_detected_when_views_are_added(images: Path, tmp_path: Path) -> None:
    data = shutil.copytree(images, tmp_path / "data")
    export(data, tmp_path / "store", views=2)
    names = sorted(data.rglob("*.jpg"), key=lambda file: str(file.relative_to(data)))
    shutil.copy(names[0], names[20])
    with pytest.raises(UserError, match=f"the first is {names[20].relative_to(data)}; put them back"):
        export(data, tmp_path / "store", views=4)
    shutil.copy(images / names[20].relative_to(data), names[20])
    export(data, tmp_path / "store", views=4).require_complete()


# ---------------------------------------------------------------- images and features that cannot be used


def test_files_that_are_no_images_keep_their_row_and_are_listed(images: Path, tmp_path: Path, capsys: Any) -> None:
    data = shutil.copytree(images, tmp_path / "data")
    names = sorted(str(file.relative_to(data)) for file in data.rglob("*.jpg"))
    (data / names[3]).write_bytes((data / names[3]).read_bytes()[:-200])
    (data / names[17]).write_bytes(b"")
    (data / names[36]).write_bytes(b"no image")
    good = [i for i in range(37) if i not in (3, 17, 36)]
    store, clean = export(data, tmp_path / "store"), export(images, tmp_path / "clean")
    assert store.table("sample_id").tolist() == names
    assert np.flatnonzero(store.table("status")).tolist() == [3, 17, 36]
    assert store.table("status")[[3, 17, 36]].tolist() == [BROKEN, NOT_AN_IMAGE, NOT_AN_IMAGE]
    for v in range(5):
        assert np.array_equal(store.read("embedding", v)[good], clean.read("embedding", v)[good])
        assert not store.read("embedding", v)[[3, 17, 36]].any()
    lines = (tmp_path / "store/bad-images.tsv").read_text().splitlines()
    assert lines[0] == "row\tid\treason"
    assert [line.split("\t")[:2] for line in lines[1:]] == [["3", names[3]], ["17", names[17]], ["36", names[36]]]
    assert lines[2].endswith("the file is empty")
    assert "3 of 37 images could not be used (bad-images.tsv)" in capsys.readouterr().err
    assert not (tmp_path / "clean/bad-images.tsv").exists()


def test_bad_files_change_no_byte_between_one_and_two_processes(images: Path, tmp_path: Path) -> None:
    data = shutil.copytree(images, tmp_path / "data")
    for file in sorted(data.rglob("*.jpg"))[::9]:
        file.write_bytes(b"no image")
    for workers in (0, 2):
        export(data, tmp_path / str(workers), workers=workers)
    assert tree(tmp_path / "0") == tree(tmp_path / "2")


NOT_FINITE_TEACHER = '''
import torch
from torch import nn

class NotFinite(nn.Module):
    """Means of the channels; the third one is `value` where the red channel's mean is above a threshold."""
    preprocessing = {"size": 16, "mean": (0, 0, 0), "std": (1, 1, 1), "crop_ratio": 1.0}

    def __init__(self, value: float, above: float):
        super().__init__()
        self.value, self.above = value, above

    def forward(self, images):
        out = images.mean((2, 3))
        out[:, 2] = torch.where(out[:, 0] > self.above, self.value, out[:, 2])
        return out

def not_finite(value: float, above: float) -> nn.Module:
    return NotFinite(float(value), above)
'''


def reds(root: Path, levels: list[int]) -> Path:
    """Images that are red on the left and black on the right, so that crops have different means of red."""
    root.mkdir()
    for i, level in enumerate(levels):
        pixels = np.zeros((32, 32, 3), np.uint8)
        pixels[:, :16, 0] = level
        Image.fromarray(pixels).save(root / f"{i}.png")
    return root


@pytest.mark.parametrize(
    ("value", "codec", "found"),
    [
        ("nan", "int8", True), ("inf", "float32", True), ("-inf", "float16", True),
        ("70000", "float16", True), ("70000", "int8", False), ("65504", "float16", False),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("error::RuntimeWarning")  # such features are set to 0 before they are encoded
def test_features_that_are_not_finite_or_too_large_for_the_codec_are_found(
    tmp_path: Path, value: str, codec: str, found: bool
) -> None:
    (tmp_path / "not_finite.py").write_text(NOT_FINITE_TEACHER)
    data = reds(tmp_path / "data", [10, 255, 20])
    teacher = f"python:{tmp_path}/not_finite.py:not_finite,value={value},above=0.4"
    store = export(data, tmp_path / "store", teacher=teacher, codec=codec, views=3)
    assert store.table("status").tolist() == [0, NOT_FINITE if found else 0, 0]
    if found:
        reason = f"the teacher's feature is not finite (embedding, view 0, as {codec})"
        assert store.bad_images()[0][2].startswith(reason)
    assert np.isfinite(np.stack([store.read("embedding", v) for v in range(3)])).all()


def test_a_feature_that_is_not_finite_in_an_added_view_makes_the_row_bad(tmp_path: Path) -> None:
    (tmp_path / "not_finite.py").write_text(NOT_FINITE_TEACHER)
    data = reds(tmp_path / "data", [255] * 12)
    teacher = f"python:{tmp_path}/not_finite.py:not_finite,value=nan,above=0.9"
    for views in (1, 2, 7):
        grown = export(data, tmp_path / "grown", teacher=teacher, views=views)
    fresh = export(data, tmp_path / "fresh", teacher=teacher, views=7)
    assert 0 < np.count_nonzero(fresh.table("status")) < 12
    assert tree(tmp_path / "grown") == tree(tmp_path / "fresh")
    assert len({why for _, _, why in grown.bad_images()}) > 1  # features of several views were not finite


def test_a_teacher_whose_features_are_all_nan_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "not_finite.py").write_text(NOT_FINITE_TEACHER)
    data = reds(tmp_path / "data", [10, 255])
    with pytest.raises(
        UserError, match="none of the 2 images could be used; the first is 0.png: the teacher's feature"
    ):
        export(
            data, tmp_path / "store", teacher=f"python:{tmp_path}/not_finite.py:not_finite,value=nan,above=-1", views=2
        )


# ---------------------------------------------------------------- dry run


@pytest.mark.parametrize(("views", "codec"), [(1, "float32"), (5, "int8"), (8, "float16")])
def test_a_dry_run_predicts_forwards_bytes_and_files_of_the_export(
    images: Path, tmp_path: Path, views: int, codec: str
) -> None:
    out = tmp_path / "store"
    plan = export_teacher.run(config(images, out, views=views, codec=codec, dry_run=True))
    assert not out.exists()
    export(images, out, views=views, codec=codec)
    grown = [*(out / "done").iterdir()]
    for name in ("embedding", "embedding_scale", "status", "content"):
        grown += [file for file in (out / "features.zarr" / name / "c").rglob("*") if file.is_file()]
    data = sum(file.stat().st_size for file in grown if "embedding" in str(file))
    rows = 3 * 16  # the last shard is stored with all of its 16 rows
    item = {"int8": WIDTH + 4, "float16": 2 * WIDTH, "float32": 4 * WIDTH}[codec]
    assert (plan["images"], plan["views"], plan["shard_rows"]) == (37, views, 16)
    assert plan["forwards"] == 37 * views
    assert plan["bytes"] == 37 * views * item
    assert plan["files"] == len(grown)
    assert plan["bytes"] <= data <= rows * (views + 3) * item + 200 * len(grown)
    assert plan["free_bytes"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert f"{37 * views} forwards" in plan["summary"] and f"{len(grown)} files" in plan["summary"]


def test_a_dry_run_over_an_existing_store_changes_nothing(images: Path, tmp_path: Path) -> None:
    export(images, tmp_path / "store", views=2)
    before = tree(tmp_path)
    export_teacher.run(config(images, tmp_path / "store", views=2, dry_run=True))
    export_teacher.run(config(images, tmp_path / "store", views=2, seed=1, dry_run=True, overwrite=True))
    assert tree(tmp_path) == before


# ---------------------------------------------------------------- overwriting, history


def test_overwrite_moves_the_earlier_store_aside(images: Path, tmp_path: Path, capsys: Any) -> None:
    first = tree(export(images, tmp_path / "store", views=1).storage.path)  # type: ignore[attr-defined]
    export(images, tmp_path / "store", views=2, seed=1, overwrite=True)
    assert tree(tmp_path / "store.old-1") == first
    assert FeatureStore(Folder(tmp_path / "store")).identity.views.seed == 1
    assert "aside" in capsys.readouterr().err


def test_each_export_appends_a_line_to_the_history(images: Path, tmp_path: Path) -> None:
    for views in (2, 3):
        export(images, tmp_path / "store", views=views)
    lines = [json.loads(line) for line in (tmp_path / "store/history.jsonl").read_text().splitlines()]
    assert [(line["images"], line["views"]) for line in lines] == [(37, 74), (37, 37)]
    assert all(torch.__version__.startswith(line["versions"]["torch"]) for line in lines)
