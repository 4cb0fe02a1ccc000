"""Data sets: ids, labels and their order, from folders, the digits and torchvision."""

import hashlib
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from compress_ssl.pipeline.datasets import DATASETS
from compress_ssl.pipeline.datasets.base import Dataset, content_hash
from compress_ssl.pipeline.datasets.decode import BROKEN, NOT_AN_IMAGE, UNREADABLE, BadImage
from compress_ssl.pipeline.datasets.folder import SUFFIXES, Folder, escape
from compress_ssl.pipeline.runtime.errors import UserError

ROOT = Path(__file__).parents[1]


def picture(seed: int = 0) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


def plant(root: Path, *names: str | bytes) -> Path:
    """A folder with a different image under each name."""
    for number, name in enumerate(names):
        file = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with open(file, "wb") as out:
            out.write(picture(number))
    return root


# ---------------------------------------------------------------- folders


def test_class_subfolders_give_labels(tmp_path: Path) -> None:
    data = Folder(plant(tmp_path, "dog/2.png", "cat/1.png", "dog/1.png", "ant/x/y/1.png"))
    assert data.ids == ["ant/x/y/1.png", "cat/1.png", "dog/1.png", "dog/2.png"]
    assert data.classes == ("ant", "cat", "dog")
    assert data.label.tolist() == [0, 1, 2, 2]
    assert data.label.dtype == np.int64


def test_a_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    data = Folder(plant(tmp_path, "b.png", "a.png"))
    assert (data.ids, data.classes, data.label.tolist()) == (["a.png", "b.png"], (), [-1, -1])


def test_a_folder_with_images_beside_its_subfolders_is_unlabelled(tmp_path: Path) -> None:
    data = Folder(plant(tmp_path, "cat/1.png", "loose.png"))
    assert (data.ids, data.classes, data.label.tolist()) == (["cat/1.png", "loose.png"], (), [-1, -1])


def test_labels_false_ignores_the_subfolders(tmp_path: Path) -> None:
    data = DATASETS.build(f"folder:{plant(tmp_path, 'cat/1.png', 'dog/1.png')},labels=false")
    assert (data.classes, data.label.tolist()) == ((), [-1, -1])


def test_a_spec_that_is_only_a_path_means_a_folder(tmp_path: Path) -> None:
    assert DATASETS.build(str(plant(tmp_path, "a.png"))).ids == ["a.png"]


def test_each_row_loads_its_own_file(tmp_path: Path) -> None:
    names = ["b/1.png", "a/2.png", "a/1.png"]
    data = Folder(plant(tmp_path, *names))
    for number, name in enumerate(names):
        pixels, content = data.load(data.ids.index(name))
        assert np.array_equal(pixels, np.random.default_rng(number).integers(0, 256, (6, 5, 3), np.uint8))
        assert content == int.from_bytes(hashlib.blake2b(picture(number), digest_size=8).digest(), "little")


def test_hidden_files_and_folders_are_skipped(tmp_path: Path) -> None:
    plant(tmp_path, "a.png", ".b.png", "._a.png", ".cache/c.png", "d/.hidden/e.png", "__MACOSX.png")
    assert Folder(tmp_path).ids == ["__MACOSX.png", "a.png"]


def test_only_files_with_image_suffixes_in_upper_or_lower_case_are_images(tmp_path: Path) -> None:
    good = [f"x{suffix}" for suffix in SUFFIXES] + ["y.JPG", "y.Jpeg", "two.dots.png"]
    plant(tmp_path, *good, "notes.txt", "png", "x.png.bak", "x.npy", "list.csv")
    assert Folder(tmp_path).ids == sorted(good)


def test_a_folder_with_an_image_suffix_is_not_taken_for_an_image(tmp_path: Path) -> None:
    assert Folder(plant(tmp_path, "cat.png/1.png", "dog/1.png")).classes == ("cat.png", "dog")


def test_names_that_are_not_utf8_are_escaped_and_load(tmp_path: Path) -> None:
    names = [b"caf\xe9/\xff\xfe.png", b"caf\xe9/100%.png", "café/ü.png".encode()]
    data = Folder(plant(tmp_path, *names))
    assert sorted(data.ids) == sorted(["caf%E9/%FF%FE.png", "caf%E9/100%.png", "café/ü.png"])
    assert set(data.classes) == {"café", "caf%E9"}
    assert {content_hash(picture(n)) for n in range(3)} == {data.load(i)[1] for i in range(3)}
    assert all(name.encode() for name in data.ids)


@given(st.sets(st.lists(st.sampled_from([b"%", b"\xff", b"F", b"2", b"5", "ü".encode(), b"\xc3"])).map(b"".join)))
@example({b"\xff", b"%FF", b"%25FF", b"%2525FF", b"%\xff", b"%%FF"})
def test_escaped_names_stay_distinct_and_are_text(names: set[bytes]) -> None:
    escaped = [escape(name) for name in names]
    assert len(set(escaped)) == len(names)
    assert all(text.encode().decode() == text for text in escaped)


@pytest.mark.parametrize("name", ["a.png", "ü/100%.png", "50% off/x.png", "a%20b.png", "%zz", "日本/1.png"])
def test_ordinary_names_are_left_as_they_are(name: str) -> None:
    assert escape(name.encode()) == name


def test_files_are_sorted_by_the_bytes_of_their_names_in_every_locale(tmp_path: Path) -> None:
    names = ["B.png", "a.png", "Z/1.png", "z/1.png", "ä.png", "10.png", "9.png", "a/b.png", "a-b.png"]
    plant(tmp_path, *names)
    wanted = sorted(names, key=os.fsencode)
    assert Folder(tmp_path).ids == wanted
    code = (
        "from pathlib import Path; from compress_ssl.pipeline.datasets.folder import Folder; "
        f"print(ascii(Folder(Path({str(tmp_path)!r})).ids))"
    )
    for name in ("C", "tr_TR.UTF-8"):
        env = {**os.environ, "LC_ALL": name, "LANG": name, "PYTHONUTF8": "0"}
        out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert out.stdout.strip() == ascii(wanted)


def test_symbolic_links_are_followed(tmp_path: Path) -> None:
    plant(tmp_path / "elsewhere", "1.png", "sub/2.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/dog").symlink_to(tmp_path / "elsewhere/sub")
    assert Folder(tmp_path / "set").ids == ["cat/1.png", "cat/sub/2.png", "dog/2.png"]


def test_a_symbolic_link_to_a_parent_folder_is_not_followed(tmp_path: Path) -> None:
    plant(tmp_path, "cat/1.png", "dog/1.png")
    for name in ("cat", "dog"):
        for link in ("up", "here"):
            (tmp_path / name / link).symlink_to(tmp_path if link == "up" else tmp_path / name)
    assert Folder(tmp_path).ids == ["cat/1.png", "dog/1.png"]


def test_a_dangling_symbolic_link_is_an_unreadable_image(tmp_path: Path) -> None:
    plant(tmp_path, "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    data = Folder(tmp_path)
    assert data.ids == ["a.png", "b.png"]
    with pytest.raises(BadImage, match="No such file") as caught:
        data.load(1)
    assert caught.value.status == UNREADABLE


def test_a_subfolder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, "cat/1.png", "dog/1.png")
    scandir = os.scandir

    def refuse(path: bytes) -> object:
        if os.fsencode(path).endswith(b"/dog"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="dog cannot be listed"):
        Folder(tmp_path)


@pytest.mark.parametrize("data", [b"", b"not an image"])
def test_a_file_that_is_no_image_keeps_its_row(tmp_path: Path, data: bytes) -> None:
    plant(tmp_path, "a.png", "c.png")
    (tmp_path / "b.png").write_bytes(data)
    images = Folder(tmp_path)
    assert images.ids == ["a.png", "b.png", "c.png"]
    with pytest.raises(BadImage) as caught:
        images.load(1)
    assert caught.value.status == NOT_AN_IMAGE
    assert images.load(2)[1] == content_hash(picture(1))


def test_a_folder_with_several_splits_is_refused_and_the_error_lists_their_paths(tmp_path: Path) -> None:
    plant(tmp_path, "train/cat/1.png", "val/cat/1.png")
    with pytest.raises(UserError) as caught:
        Folder(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} holds train/ and val/; name one of them: folder:{tmp_path}/train or folder:{tmp_path}/val"
    )
    assert Folder(tmp_path / "train").classes == ("cat",)


def test_a_missing_folder_a_file_and_an_empty_folder_are_refused_with_an_explanation(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data folder .*nowhere does not exist"):
        Folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not a folder"):
        Folder(plant(tmp_path, "a.png") / "a.png")
    (tmp_path / "empty/sub").mkdir(parents=True)
    with pytest.raises(UserError, match=r"empty holds no image files .*\.jpg"):
        Folder(tmp_path / "empty")


# ---------------------------------------------------------------- fingerprints


def test_a_fingerprint_depends_on_names_and_labels_but_not_on_path_or_contents(tmp_path: Path) -> None:
    one, two = plant(tmp_path / "1", "cat/1.png", "dog/2.png"), plant(tmp_path / "2", "dog/2.png", "cat/1.png")
    assert Folder(one).fingerprint == Folder(two).fingerprint
    others = [
        Folder(one, labels=False),
        Folder(plant(tmp_path / "3", "cat/1.png", "dog/3.png")),
        Folder(plant(tmp_path / "4", "cat/1.png", "dog/2.png", "dog/3.png")),
        Folder(plant(tmp_path / "5", "cat/1.png", "emu/2.png")),
    ]
    assert len({data.fingerprint for data in [Folder(one), *others]}) == 5


class Named(Dataset):
    """A data set with ids and labels but no pixels."""

    def __init__(self, ids: list[str], label: list[int], classes: tuple[str, ...]):
        self.ids, self.label, self.classes = ids, np.array(label, np.int64), classes

    def load(self, i: int) -> tuple[np.ndarray, int]:
        return np.zeros((2, 2, 3), np.uint8), i


def test_a_fingerprint_changes_with_order_and_labels_but_not_with_class_numbers() -> None:
    base = Named(["a", "b"], [0, 1], ("x", "y"))
    assert Named(["a", "b"], [1, 2], ("w", "x", "y")).fingerprint == base.fingerprint
    for other in (
        Named(["b", "a"], [1, 0], ("x", "y")),
        Named(["a", "b"], [1, 0], ("x", "y")),
        Named(["a", "b"], [0, -1], ("x", "y")),
        Named(["a", "b"], [0, 1], ("x", "z")),
    ):
        assert other.fingerprint != base.fingerprint


def test_golden_fingerprint() -> None:
    assert Named(["a", "ü"], [0, -1], ("x",)).fingerprint == GOLDEN_FINGERPRINT


GOLDEN_FINGERPRINT = "13f7a6c37207b63690c7473f112df69d"


def test_the_difference_of_two_data_sets_is_described() -> None:
    data = Named(["a", "b", "d"], [-1] * 3, ())
    assert data.describe_difference(["a", "b", "c", "e"]) == "2 are gone, as c; 1 is new, as d"
    assert data.describe_difference(["b", "a", "d"]) == "same names, but other labels or another order"


# ---------------------------------------------------------------- subsets


@given(st.integers(1, 400), st.integers(1, 400))
def test_a_subset_is_evenly_spaced_and_in_order(n: int, k: int) -> None:
    whole = Named([f"{i:03d}" for i in range(n)], [i % 3 - 1 for i in range(n)], ("x", "y"))
    part = whole.subset(k)
    rows = [int(name) for name in part.ids]
    assert len(part) == min(n, k)
    assert len(set(rows)) == len(rows) and rows == sorted(rows)
    gaps = np.diff(rows)
    assert not len(gaps) or gaps.max() - gaps.min() <= 1
    assert rows[0] == 0 and (k == 1 or rows[-1] == n - 1)
    assert part.label.tolist() == whole.label[rows].tolist()
    assert [part.load(i)[1] for i in range(len(part))] == rows


def test_golden_subset() -> None:
    rows = [int(name) for name in Named([str(i) for i in range(10)], [-1] * 10, ()).subset(5).ids]
    assert rows == [0, 2, 4, 7, 9]


def test_a_subset_has_its_own_fingerprint_and_a_subset_of_all_images_is_the_data_set_itself() -> None:
    whole = Named(["a", "b", "c"], [-1] * 3, ())
    assert whole.subset(3) is whole and whole.subset(9) is whole
    assert whole.subset(2).fingerprint == Named(["a", "c"], [-1] * 2, ()).fingerprint != whole.fingerprint


# ---------------------------------------------------------------- digits


def test_digits_are_those_of_scikit_learn_and_every_fifth_is_a_test_image() -> None:
    from sklearn.datasets import load_digits

    theirs = load_digits()
    train, test, both = (DATASETS.build(f"digits:split={split}") for split in ("train", "test", "all"))
    assert (len(train), len(test), len(both)) == (1438, 359, 1797)
    assert sorted(train.ids + test.ids) == both.ids
    for data in (train, test, both):
        assert data.classes == tuple("0123456789")
        rows = [int(name.removeprefix("digits/")) for name in data.ids]
        assert data.label.tolist() == theirs.target[rows].tolist()
        assert all((row % 5 == 4) == (data is test) for row in rows) or data is both
        for i in (0, 7, len(data) - 1):
            pixels, content = data.load(i)
            assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
            assert np.abs(pixels[..., 1] - theirs.images[rows[i]] * 255 / 16).max() <= 0.5
            assert content == content_hash(pixels)


def test_digits_default_to_the_training_split() -> None:
    assert DATASETS.build("digits").fingerprint == DATASETS.build("digits:split=train").fingerprint


def test_a_split_of_digits_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match="split=.*val.*must be one of train, test, all"):
        DATASETS.build("digits:split=val")


# ---------------------------------------------------------------- torchvision


def cifar(root: Path) -> Path:
    """CIFAR-10 in its original format with four images per batch. torchvision checks MD5 sums, so they are replaced."""
    rng, folder = np.random.default_rng(0), root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]:
        batch = {"data": rng.integers(0, 256, (4, 3072), np.uint8), "labels": rng.integers(0, 10, 4).tolist()}
        (folder / name).write_bytes(pickle.dumps(batch))
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    return root


@pytest.fixture
def cifar_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from torchvision.datasets import CIFAR10

    root = cifar(tmp_path / "cifar")
    sums = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in (root / CIFAR10.base_folder).iterdir()}
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name, _ in CIFAR10.train_list])
    monkeypatch.setattr(CIFAR10, "test_list", [[name, sums[name]] for name, _ in CIFAR10.test_list])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    return root


def test_a_torchvision_data_set_has_the_labels_class_names_and_pixels_of_torchvision(cifar_root: Path) -> None:
    train = DATASETS.build(f"torchvision:CIFAR10,root={cifar_root},train=true")
    test = DATASETS.build(f"torchvision:CIFAR10,root={cifar_root},train=false")
    assert (len(train), len(test)) == (20, 4)
    assert train.ids[0] == "CIFAR10/00000000" and len(set(train.ids)) == 20
    batch = pickle.loads((cifar_root / "cifar-10-batches-py/data_batch_3").read_bytes())
    assert train.label[8:12].tolist() == batch["labels"]
    pixels, content = train.load(9)
    assert np.array_equal(pixels, batch["data"][1].reshape(3, 32, 32).transpose(1, 2, 0))
    assert content == content_hash(pixels)
    assert train.fingerprint != test.fingerprint


def test_class_names_stay_right_when_the_last_classes_have_no_image(cifar_root: Path) -> None:
    data = DATASETS.build(f"torchvision:CIFAR10,root={cifar_root},train=false")
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    assert data.classes == tuple(names[: data.label.max() + 1])


def test_a_torchvision_data_set_without_a_list_of_labels_is_unlabelled() -> None:
    data = DATASETS.build("torchvision:FakeData,size=3")
    assert (len(data), data.classes, data.label.tolist()) == (3, (), [-1] * 3)
    assert data.load(2)[0].shape == (224, 224, 3)


def test_a_torchvision_data_set_that_is_not_downloaded_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"torchvision:CIFAR10 could not be opened in .*root=DIR.*download=true"):
        DATASETS.build(f"torchvision:CIFAR10,root={tmp_path}")


def test_misspelt_names_and_keys_get_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data set 'CIFAR_10'; did you mean 'CIFAR10'?"):
        DATASETS.build("torchvision:CIFAR_10")
    with pytest.raises(UserError, match="no key 'trian'; did you mean 'train'?"):
        DATASETS.build(f"torchvision:CIFAR10,root={tmp_path},trian=true")
    with pytest.raises(UserError, match="no key 'label'; did you mean 'labels'?"):
        DATASETS.build(f"folder:{tmp_path},label=false")


def test_an_image_that_torchvision_fails_to_return_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    data = DATASETS.build("torchvision:FakeData,size=3")

    def fail(self: object, index: int) -> None:
        raise OSError("image file is\ntruncated")

    monkeypatch.setattr(type(data._set), "__getitem__", fail)
    with pytest.raises(BadImage, match="image file is truncated") as caught:
        data.load(0)
    assert caught.value.status == BROKEN
