"""Nasty files among good ones: nothing crashes or hangs, no row shifts, and each bad one is listed with a reason."""

import os
import signal
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
import torch
from nasty import bad_files, encoded, noise, odd_files, write_nasty_files

from compress_ssl.pipeline.datasets.base import Subset
from compress_ssl.pipeline.datasets.decode import GOOD, BadImage, decode
from compress_ssl.pipeline.datasets.folder import Folder as ImageFolder
from compress_ssl.pipeline.datasets.folder import escape
from compress_ssl.pipeline.extraction.embed import embed, store_source
from compress_ssl.pipeline.extraction.extract import LoaderSettings
from compress_ssl.pipeline.extraction.feature_extractor import FeatureExtractor
from compress_ssl.pipeline.extraction.store_record import describe_store
from compress_ssl.pipeline.models import build
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.stages import export_teacher

TEACHER = "convnet:channels=4+8,pretrained=false"
VIEWS = 3


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """Turn an endless wait for a file into a failure."""

    def hangs(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError("nasty files took more than a minute")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def settings(data: Path, out: Path, workers: int) -> export_teacher.Config:
    how = {"views": VIEWS, "image_size": 16, "batch_size": 8, "shard_size": 32, "codec": "float32", "device": "cpu"}
    return export_teacher.Config(data=str(data), teacher=TEACHER, out=out, workers=workers, **how)  # type: ignore


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """(a folder of nasty files among good ones, {sample id: the status it should get})."""
    root = tmp_path_factory.mktemp("mixed")
    expected = {escape(os.fsencode(name)): status for name, status in write_nasty_files(root).items()}
    for folder in ("a", "z"):  # before and after the nasty ones
        (root / folder).mkdir()
        for number in range(12):
            (root / folder / f"{number:02d}.png").write_bytes(encoded(noise(number, 20, number)))
            expected[f"{folder}/{number:02d}.png"] = GOOD
    return root, expected


@pytest.fixture(scope="module")
def store(mixed: tuple[Path, dict[str, int]], tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    out = tmp_path_factory.mktemp("store")
    export_teacher.run(settings(mixed[0], out, workers=0))
    return FeatureStore(Folder(out))


def good_ones_alone(dataset: ImageFolder, rows: np.ndarray, data: Path, out: Path) -> FeatureStore:
    """An export of the good images alone, each with the view key that it has among the nasty ones."""
    config = settings(data, out, workers=0)
    torch.manual_seed(0)
    model = build(TEACHER, image_size=16, pretrained_default=True)
    few = Subset(dataset, rows)
    record = describe_store(replace(export_teacher.resolve(config), dataset=few), model)
    tables = {"sample_id": few.ids, "label": few.label, "view_key": rows}
    made = FeatureStore.create(Folder(out), record, tables)
    forward = FeatureExtractor(model, torch.device("cpu"), "fp32", 8)
    embed(made, store_source(made, few, forward, LoaderSettings()), made.pending())
    return made


def test_there_are_at_least_sixty_nasty_files_all_different(mixed: tuple[Path, dict[str, int]]) -> None:
    contents = [*bad_files().values(), *odd_files().values()]
    assert len({*contents}) == len(contents) - 1  # two files have the same content and differ only in their names
    nasty = [name for name in mixed[1] if name.startswith("nasty/")]
    assert len(nasty) >= 90
    assert sum(status != GOOD for name, status in mixed[1].items()) >= 45


def test_each_nasty_file_gets_its_status_and_every_bad_one_a_reason(
    mixed: tuple[Path, dict[str, int]], store: FeatureStore
) -> None:
    expected = mixed[1]
    ids = store.table("sample_id").tolist()
    assert sorted(ids) == sorted(expected)
    found = dict(zip(ids, store.table("status").tolist(), strict=True))
    wrong = {name: (found[name], wanted) for name, wanted in expected.items() if wanted >= 0 and found[name] != wanted}
    assert not wrong
    assert all(found[name] != GOOD for name, wanted in expected.items() if wanted < 0)
    text = store.storage.get("bad-images.tsv").decode()
    lines = [line.split("\t") for line in text.rstrip("\n").split("\n")]
    assert all(len(line) == 3 and line[2] for line in lines)
    listed = {int(line[0]) for line in lines[1:]}
    assert listed == {i for i, name in enumerate(ids) if found[name] != GOOD}
    assert {line[1] for line in lines[1:] if "\\" not in line[1]} <= {*ids}


def test_nasty_files_do_not_shift_the_rows_of_others(
    mixed: tuple[Path, dict[str, int]], store: FeatureStore, tmp_path: Path
) -> None:
    rows = np.flatnonzero(store.table("status") == GOOD)
    alone = good_ones_alone(ImageFolder(mixed[0]), rows, mixed[0], tmp_path / "alone")
    assert alone.table("sample_id").tolist() == store.table("sample_id")[rows].tolist()
    assert not alone.table("status").any()
    for view in range(VIEWS):
        among = store.read("embedding", view)
        np.testing.assert_array_equal(among[rows], alone.read("embedding", view))
        assert not np.delete(among, rows, axis=0).any()


@pytest.mark.parametrize("loader", [LoaderSettings(2), LoaderSettings(3, threads=True)], ids=["processes", "threads"])
def test_loader_processes_and_threads_treat_nasty_files_alike(
    mixed: tuple[Path, dict[str, int]], store: FeatureStore, tmp_path: Path, loader: LoaderSettings
) -> None:
    config = settings(mixed[0], tmp_path / "store", workers=0)
    torch.manual_seed(0)
    model = build(TEACHER, image_size=16, pretrained_default=True)
    dataset = ImageFolder(mixed[0])
    record = describe_store(export_teacher.resolve(config), model)
    tables = {"sample_id": dataset.ids, "label": dataset.label, "view_key": range(len(dataset))}
    made = FeatureStore.create(Folder(tmp_path / "store"), record, tables)
    forward = FeatureExtractor(model, torch.device("cpu"), "fp32", 8)
    embed(made, store_source(made, dataset, forward, loader), made.pending())
    done = [key for key in store.storage.list("done")]
    assert done and {key: made.storage.get(key) for key in done} == {key: store.storage.get(key) for key in done}


def test_decoding_in_threads_leaves_other_warning_filters_unchanged() -> None:
    files = [data for data in (*bad_files().values(), *odd_files().values()) if len(data) < 3000]

    def attempt(data: bytes) -> None:
        try:
            decode(data)
        except BadImage:
            pass

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(attempt, files * 10))
        added = warnings.filters[: len(warnings.filters) - len(before)]
        assert warnings.filters[len(added) :] == before
        assert {entry[3].pattern for entry in added if entry[3]} == {"PIL"}
        with pytest.raises(UserWarning):
            warnings.warn("a warning of other code", stacklevel=2)
