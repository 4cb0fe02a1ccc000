"""check_dataset: a test of what export, training and evaluation need of every data set, for your own too."""

import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress_ssl.pipeline.datasets.base import Dataset
from compress_ssl.pipeline.datasets.decode import GOOD, REASONS, BadImage
from compress_ssl.pipeline.datasets.user_dataset import adapt, describe_problem
from compress_ssl.pipeline.runtime.errors import UserError

SAMPLE = 16
"""Images that are loaded, evenly spread over the data set."""

THREADS = 4
"""Threads that load images at the same time, as the workers of dask and the cache of decoded images do."""

OURS = ("fingerprint", "describe_difference", "restore_selection", "subset")
"""Members of Dataset that no subclass replaces: a store is recognised by them."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """What `load` did with an image: its pixels and content hash, or the status of the BadImage that it raised."""

    pixels: np.ndarray  # (H, W, 3) uint8; (0, 0, 3) of a bad image
    content: int  # 0 of a bad image
    status: int  # a code of datasets/decode.py
    why: str = ""  # the reason of a bad image

    def equals(self, other: "Loaded") -> bool:
        same = (self.content, self.status) == (other.content, other.status)
        return same and np.array_equal(self.pixels, other.pixels)


# ---------------------------------------------------------------- the public check


def check_dataset(build: Callable[..., object], /, *arguments: object, **options: object) -> None:
    """Open a data set twice, load some of its images, and raise AssertionError if it breaks a requirement.

    The assertions, in their order, and what each protects:

    - `ids` are texts that differ, `label` has one index into `classes`, or -1, per image, `classes` differ, and what
      subclasses of Dataset must leave alone is left alone: a store is recognised by the fingerprint of these three.
    - A second data set, built alike, has the same images in the same order: otherwise no export could be continued.
    - `load(i)` returns (H, W, 3) uint8 pixels and a content hash, or raises BadImage; not every image is bad.
    - `load(i)` returns the same each time, from several threads too, and other pixels have another hash: otherwise
      the student would not see what the teacher saw.
    - The data set pickles to a fresh process and loads the same there: loader processes receive it in this way.
    - `changed_rows` returns no rows while nothing has changed, and no rows but those whose hashes differ.

    build: the class or function, called as build(*arguments, **options), twice. It returns a Dataset, or a map-style
    data set as torch has them. Define it in a module: a class of an interactive session cannot be pickled.

    Example, in a file of tests (the class Photos is in docs/plugins.md):
        from compress_ssl.pipeline.testing import check_dataset
        from mine import Photos

        def test_photos_meet_the_requirements_of_a_data_set():
            check_dataset(Photos, folder="tests/photos")
    """
    name = getattr(build, "__name__", type(build).__name__)
    made = build(*arguments, **options)
    dataset = _open(made, name)
    if isinstance(made, Dataset):
        _require_declared(made, name)
    _require_same_images(dataset, _open(build(*arguments, **options), name), name)
    rows = np.unique(np.linspace(0, len(dataset) - 1, min(SAMPLE, len(dataset))).round().astype(int)).tolist()
    if isinstance(made, Dataset):
        _require_loads(made, rows, name)
    images = load_rows(dataset, rows)
    assert any(image.status == GOOD for image in images), (
        f"{name}: none of the {len(rows)} images that were tried can be used; the first: {images[0].why}"
    )
    _require_repeatable(dataset, rows, images, name)
    _require_content_hashes(rows, images, name)
    _require_picklable(dataset, rows, images, name)
    _require_changed_rows(dataset, rows, images, name)


# ---------------------------------------------------------------- opening


def _open(made: object, name: str) -> Dataset:
    """The data set as the commands use it, which refuses wrong ids, labels and classes."""
    try:
        return adapt(made, name, None)
    except UserError as wrong:
        raise AssertionError(str(wrong)) from None


def _require_declared(made: Dataset, name: str) -> None:
    """Assert that the members of a subclass of Dataset have the types that it declares, and that OURS are its own."""
    label = getattr(made, "label", None)
    assert isinstance(label, np.ndarray) and label.dtype == np.int64, (
        f"{name}: its `label` is not an array of int64; use np.array(labels, np.int64), with -1 for no label"
    )
    assert isinstance(made.ids, list), f"{name}: its `ids` are a {type(made.ids).__name__}, not a list of texts"
    assert isinstance(getattr(made, "classes", None), tuple), f"{name}: its `classes` are not a tuple of texts"
    replaced = [member for member in OURS if getattr(type(made), member) is not getattr(Dataset, member)]
    assert not replaced, f"{name} replaces {replaced[0]} of Dataset, by which stores are recognised; leave it out"


def _require_same_images(first: Dataset, second: Dataset, name: str) -> None:
    assert second.ids == first.ids, (
        f"{name} has other ids, or another order, when it is built again ({first.describe_difference(second.ids)}); "
        "sort what you list, and use no random numbers"
    )
    assert np.array_equal(first.label, second.label) and first.classes == second.classes, (
        f"{name} has other labels or classes when it is built again; sort the classes"
    )
    assert first.fingerprint == second.fingerprint


# ---------------------------------------------------------------- loading


def load_rows(dataset: Dataset, rows: Sequence[int]) -> list[Loaded]:
    """Load these images. A fresh process runs this too."""
    return [_load(dataset, i) for i in rows]


def _load(dataset: Dataset, i: int) -> Loaded:
    try:
        return Loaded(*dataset.load(i), GOOD)
    except BadImage as bad:
        return Loaded(np.empty((0, 0, 3), np.uint8), 0, bad.status, str(bad))


def _require_loads(made: Dataset, rows: Sequence[int], name: str) -> None:
    """Assert that `load` returns pixels and a content hash, or raises BadImage."""
    for i in rows:
        try:
            problem = describe_problem(*made.load(i))
        except BadImage as bad:
            assert bad.status in REASONS and bad.status != GOOD, (
                f"{name}.load({i}) raised BadImage with status {bad.status}; take one of datasets/decode.py, as BROKEN"
            )
            continue
        except Exception as wrong:
            raise AssertionError(
                f"{name}.load({i}) raised {type(wrong).__name__}: {wrong}; for an image that cannot be used, raise "
                "BadImage(BROKEN, the reason)"
            ) from wrong
        assert not problem, f"{name}.load({i}) returned {problem}"


def _require_repeatable(dataset: Dataset, rows: Sequence[int], images: Sequence[Loaded], name: str) -> None:
    """Assert that the images are the same the second time, and from several threads at once."""
    again = load_rows(dataset, rows)
    for i, first, second in zip(rows, images, again, strict=True):
        assert first.equals(second), (
            f"{name} returns another image {i} the second time; take random transforms out, views are drawn later"
        )
    with ThreadPoolExecutor(THREADS) as pool:
        each = [pool.submit(load_rows, dataset, list(rows)[turn:] + list(rows)[:turn]) for turn in range(THREADS)]
        for turn, future in enumerate(each):
            expected = list(images)[turn:] + list(images)[:turn]
            same = all(one.equals(other) for one, other in zip(future.result(), expected, strict=True))
            assert same, (
                f"{name} returns other images when {THREADS} threads load at once; share no open file between calls "
                "of load, or hold a lock"
            )


def _require_content_hashes(rows: Sequence[int], images: Sequence[Loaded], name: str) -> None:
    """Assert that different pixels have different content hashes."""
    seen: dict[int, int] = {}
    for number, image in enumerate(images):
        if image.status != GOOD:
            continue
        other = seen.setdefault(image.content, number)
        assert np.array_equal(images[other].pixels, image.pixels), (
            f"{name} returns one content hash for the different images {rows[other]} and {rows[number]}; use "
            "compress_ssl.pipeline.datasets.base.content_hash(bytes of the image)"
        )


# ---------------------------------------------------------------- a fresh process, changed images

_PROGRAM = """
import pickle, sys
with open(sys.argv[1], "rb") as file:
    path, data, rows = pickle.load(file)
sys.path[:] = path
from compress_ssl.pipeline.testing.dataset import load_rows
loaded = load_rows(pickle.loads(data), rows)
with open(sys.argv[2], "wb") as file:
    pickle.dump(loaded, file)
"""


def _require_picklable(dataset: Dataset, rows: Sequence[int], images: Sequence[Loaded], name: str) -> None:
    """Assert that the pickled data set loads the same images in a process that shares nothing with this one."""
    try:
        data = pickle.dumps(dataset)
    except Exception as wrong:
        raise AssertionError(
            f"{name} cannot be pickled ({type(wrong).__name__}: {wrong}), so loader processes cannot receive it; open "
            "files and databases in load, and define the class in a module"
        ) from wrong
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "given", Path(folder) / "found"
        given.write_bytes(pickle.dumps((sys.path, data, list(rows))))
        command = [sys.executable, "-c", _PROGRAM, str(given), str(found)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert not done.returncode, (
            f"{name} cannot be used in a fresh process ({(done.stderr.strip().splitlines() or ['it ended'])[-1]}); "
            "define the class in a module, and keep in the object all that load needs"
        )
        there = pickle.loads(found.read_bytes())
    for i, here, fresh in zip(rows, images, there, strict=True):
        assert here.equals(fresh), (
            f"{name} returns another image {i} in a fresh process; load may depend on nothing but the object and i"
        )


def _require_changed_rows(dataset: Dataset, rows: Sequence[int], images: Sequence[Loaded], name: str) -> None:
    """Assert that `changed_rows` names at most the rows whose hashes differ from those that it is given."""
    content = np.zeros(len(dataset), np.uint64)
    for i, image in zip(rows, images, strict=True):
        content[i] = image.content
    changed = dataset.changed_rows(content, 0.0)
    assert not list(changed), (
        f"{name}.changed_rows names {list(changed)[:5]}, whose images have not changed; compare with the hashes that "
        "load returns, and leave out rows whose hash is 0"
    )
    good = next(i for i, image in zip(rows, images, strict=True) if image.status == GOOD)
    content[good] ^= np.uint64(1)
    named = list(dataset.changed_rows(content, 0.0))
    assert named in ([], [good]), f"{name}.changed_rows names {named[:5]}, but only the hash of image {good} differs"
