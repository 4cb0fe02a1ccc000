"""The records of a store are written byte for byte as they were read, whichever command or version made them."""

from pathlib import Path

import pytest

from compress_ssl.pipeline.runtime import artifact, digests
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.records import to_json
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.store.done_record import read_done_record
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.pipeline.store.records import read_history, read_store
from compress_ssl.stages import evaluate, export_teacher, inspect, store_copy

VERSION1 = Path(__file__).parent / "version1"
OF_VERSION1 = sorted(
    file.parent
    for file in VERSION1.rglob("manifest.json")
    if "copy" not in file.parts and (file.parent / "features.zarr").is_dir()
)


def require_round_trip(folder: Path) -> None:
    """Every record of a store is the bytes of its file again when it is written."""
    record = read_store(Folder(folder))
    written = artifact.Manifest(artifact.FORMAT, "store", to_json(record.identity), to_json(record.about))
    assert artifact.to_bytes(written) == (folder / "manifest.json").read_bytes()
    done = sorted((folder / "done").iterdir())
    assert done
    for file in done:
        assert read_done_record(file.read_bytes(), file.name).to_bytes() == file.read_bytes()
    if (folder / "history.jsonl").exists():
        raw = (folder / "history.jsonl").read_bytes()
        events, unreadable = read_history(raw, "history.jsonl")
        assert b"".join(digests.canonical(to_json(event)) + b"\n" for event in events) == raw and not unreadable


@pytest.mark.parametrize("folder", OF_VERSION1, ids=lambda folder: str(folder.relative_to(VERSION1)))
def test_the_records_of_version_1_are_written_as_they_were_read(folder: Path) -> None:
    require_round_trip(folder)


def test_stores_and_features_of_evaluations_of_version_1_are_among_them() -> None:
    names = {str(folder.relative_to(VERSION1)) for folder in OF_VERSION1}
    assert {"store", "store-half", "evaluation/teacher/features/val", "evaluation/student/features/train"} <= names


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 digits in 6 views and a local crop, product-quantised."""
    out = tmp_path_factory.mktemp("exported") / "store"
    config = export_teacher.Config(
        data="digits", teacher="convnet:channels=4+8,pretrained=false", out=str(out), views=6, local_views=1,
        seed=2**64 - 1, image_size=16, limit=32, batch_size=8, shard_size=16, codec="pq:2+zstd", device="cpu",
        workers=0,
    )  # fmt: skip
    export_teacher.run(config)
    return out


def test_an_export_a_copy_of_a_copy_and_a_second_teacher_are_written_as_they_are_read(
    exported: Path, tmp_path: Path
) -> None:
    require_round_trip(exported)
    store_copy.run(store_copy.Config(str(exported), str(tmp_path / "part"), views="4:6", images="1:20"))
    store_copy.run(store_copy.Config(str(tmp_path / "part"), str(tmp_path / "float"), codec="float16"))
    teacher = export_teacher.Config(
        data="digits", teacher="convnet:channels=6,pretrained=false", out=str(tmp_path / "second"), limit=32,
        like=str(exported), device="cpu", workers=0,
    )  # fmt: skip
    export_teacher.run(teacher)
    for name in ("part", "float", "second"):
        require_round_trip(tmp_path / name)
    part, second = read_store(Folder(tmp_path / "part")), read_store(Folder(tmp_path / "second"))
    assert part.about.first == 4 and part.about.data and part.about.data.selected
    assert part.about.copied_from == str(exported) and part.identity.parent
    assert second.about.like == FeatureStore(Folder(exported)).fingerprint


@pytest.fixture(scope="module")
def features(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The features of an evaluation."""
    out = tmp_path_factory.mktemp("evaluated") / "evaluation"
    evaluate.run(
        evaluate.Config(
            store=str(exported), val="digits:split=test", protocol=("nn",), out=out, device="cpu", workers=0
        )
    )
    return out / "features/val"


def test_the_features_of_an_evaluation_say_nothing_of_their_origin_and_are_shown_and_copied_all_the_same(
    features: Path, tmp_path: Path
) -> None:
    require_round_trip(features)
    assert "scored by an evaluation" in inspect.run(inspect.Config(str(features)))["data"]
    store_copy.run(store_copy.Config(str(features), str(tmp_path / "whole")))
    require_round_trip(tmp_path / "whole")
    with pytest.raises(UserError, match="holds the features of view 0 that an evaluation wrote"):
        store_copy.run(store_copy.Config(str(features), str(tmp_path / "part"), images="0:5"))
    with pytest.raises(UserError, match="holds the features of view 0 that an evaluation wrote"):
        export_teacher.run(
            export_teacher.Config("digits", "convnet:channels=4,pretrained=false", str(features), workers=0)
        )
