"""The record of a run: read at one place, written back byte for byte; what is malformed ends in words."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from forgery import MISSING, Place, changed, places, read_entries, write_entries

from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.records import InvalidRecord, to_json
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.training.metrics_log import MetricsLog, MetricsRow, read_metrics
from compress_ssl.pipeline.training.run_record import read_run
from compress_ssl.stages import distill, evaluate, export_teacher, inspect

pytestmark = pytest.mark.usefixtures("one_thread")

VERSION1 = Path(__file__).parent / "version1"
FLAGS: dict[str, Any] = {"student": ("convnet:channels=4",), "method": "compress-1q", "workers": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store, a finished run of it and the run's evaluation."""
    home = tmp_path_factory.mktemp("made")
    teacher = "convnet:channels=4+8,pretrained=false"
    export_teacher.run(
        export_teacher.Config(
            "digits", teacher, str(home / "store"), views=3, image_size=8, limit=40, workers=0, device="cpu"
        )
    )
    repeat(home, steps=2, image_size=8)
    score(home)
    return home


def repeat(home: Path, **flags: Any) -> dict[str, Any]:
    return distill.run(distill.Config(store=str(home / "store"), out=home / "run", **{**FLAGS, **flags}))


def score(home: Path) -> dict[str, Any]:
    flags: dict[str, Any] = {"protocol": ("nn",), "workers": 0, "device": "cpu"}
    return evaluate.run(evaluate.Config(run=home / "run", val="digits:split=test", **flags))


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "home"))


# ---------------------------------------------------------------- read and written


def runs_of_version_1() -> list[Path]:
    found = [manifest.parent for manifest in VERSION1.rglob("manifest.json")]
    return sorted(folder for folder in found if artifact.read(Folder(folder)).kind == "run")


@pytest.mark.parametrize("folder", runs_of_version_1(), ids=lambda folder: str(folder.relative_to(VERSION1)))
def test_a_record_of_version_1_is_written_byte_for_byte_as_it_was_read(folder: Path) -> None:
    record = read_run(Folder(folder))
    written = artifact.Manifest(artifact.FORMAT, "run", to_json(record.identity), to_json(record.about))
    assert artifact.to_bytes(written) == (folder / "manifest.json").read_bytes()


def test_a_run_records_every_option_and_its_length(made: Path) -> None:
    record = read_run(Folder(made / "run"))
    assert record.identity.options == {"bank": 20, "tau": 0.04, "start": "store"}
    assert record.identity.student.options == {"channels": (4,)}
    assert (record.about.steps, record.about.epochs) == (2, None)
    written = artifact.Manifest(artifact.FORMAT, "run", to_json(record.identity), to_json(record.about))
    assert artifact.to_bytes(written) == (made / "run/manifest.json").read_bytes()


# ---------------------------------------------------------------- malformed


FORGERIES = (
    MISSING, None, True, -1, 0, 3, 0.5, -2.5, 1e308, 10**400, "", "x", "seed:tau_t=x,tau_t=y", "convnet:channels=99",
    [], [[]], ["x"], [3, 2, 1], {}, {"x": 1},
)  # fmt: skip


def places_of(folder: Path) -> list[Place]:
    """The places of all entries of a run's identity and about."""
    return [place for place in places(read_entries(folder)) if place[0] in ("identity", "about")]


def ends_well(act: Any) -> str:
    """The error of a command in words, "" if it ended without one. Any other exception fails the test."""
    try:
        act()
    except UserError as refusal:
        assert str(refusal) and "\n" not in str(refusal)
        return str(refusal)
    return ""


@pytest.mark.parametrize("folder", ["run", "version1"])
def test_inspect_ends_in_words_for_every_forged_entry_of_a_runs_manifest(folder: str, home: Path) -> None:
    run = home / "run"
    if folder == "version1":
        shutil.copy(VERSION1 / "runs-seed/manifest.json", run / "manifest.json")
    entries, refused = read_entries(run), 0
    for path in places_of(run):
        for value in FORGERIES:
            write_entries(run, changed(entries, path, value))
            refused += bool(ends_well(lambda: inspect.run(inspect.Config(str(run)))))
    assert refused > 10 * len(places_of(run)), "most of them are of a wrong type"


@pytest.mark.parametrize("command", ["distill", "evaluate"])
def test_a_command_ends_in_words_for_random_forgeries_of_a_runs_manifest(command: str, home: Path) -> None:
    commands = {"distill": lambda: repeat(home, steps=2), "evaluate": lambda: score(home)}
    run, draw = home / "run", random.Random(command)
    entries, paths = read_entries(run), places_of(run)
    student = (run / "student.safetensors").read_bytes()
    for _ in range(40):
        write_entries(run, changed(entries, draw.choice(paths), draw.choice(FORGERIES)))
        ends_well(commands[command])
        assert (run / "student.safetensors").read_bytes() == student
    write_entries(run, entries)
    assert not ends_well(commands[command])


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("identity", "training", "lr"), "x", "identity.training.lr: expected int | float, got str"),
        (("identity", "training", "precision"), "fp8", "identity.training.precision: invalid enum value 'fp8'"),
        (("identity", "training", "seed"), 2**64, f"identity.training.seed is more than {2**64 - 1}"),
        (("identity", "views"), [], "identity.views: expected array of length >= 1"),
        (("identity", "views"), [2, 1], "identity.views is [2, 1], but must be ascending and end with 2"),
        (
            ("identity", "student", "preprocessing", "size"),
            10**6,
            "identity.student.preprocessing.size is more than 8192",
        ),
        (("about", "views_spec", "crop_ratio"), 0, "about.views_spec.crop_ratio"),
        (("about", "steps"), 0, "about.steps: expected int >= 1"),
        (("about", "colour"), "red", "has the entry about.colour, which this version of compress does not know"),
        (("identity", "store"), MISSING, "identity: it lacks the entry store"),
    ],
)
def test_the_malformed_entry_is_named(path: tuple[str, ...], value: Any, words: str, home: Path) -> None:
    write_entries(home / "run", changed(read_entries(home / "run"), path, value))
    with pytest.raises(InvalidRecord) as error:
        read_run(Folder(home / "run"))
    assert f"{home / 'run'}/manifest.json" in str(error.value) and words in str(error.value)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("identity", "options", "tau"), "x", "identity.options.tau is x: must be a number"),
        (("identity", "options", "start"), "soon", "identity.options.start is soon: must be one of store, empty"),
        (("identity", "student", "options", "channels"), ["x"], "identity.student.options.channels is x: must be a"),
        (("identity", "options", "width"), 4, "options.width is 4 there, null asked"),
        (("identity", "method"), "compress-1q:tau=x", "identity.method: compress-1q tau=x: must be a number"),
        (("identity", "method"), "nothing", 'method is "nothing" there, "compress-1q" asked'),
        (("identity", "student", "spec"), "nothing", 'student.spec is "nothing" there'),
    ],
)
def test_a_forged_option_is_not_blamed_on_what_was_typed(
    path: tuple[str, ...], value: Any, words: str, home: Path
) -> None:
    write_entries(home / "run", changed(read_entries(home / "run"), path, value))
    with pytest.raises(UserError) as error:
        repeat(home, steps=4)
    assert words in str(error.value) and str(home / "run") in str(error.value)


# ---------------------------------------------------------------- the log


BAD_LINES = (
    b'{"loss": 1}', b'{"step": "3", "loss": 1}', b'{"step": true, "loss": 1}', b'{"step": NaN, "loss": 1}',
    b'{"step": 1.5, "loss": 1}', b'{"step": null}', b'{"step": -1}', b"[1, 2]", b"3", b"null", b'"text"', b"\xff\xfe",
    b'{"step": 1, "loss": "low"}', b'{"step": 1, "loss": [1]}', b"{", b"[" * 100_000, b"",
    b'{"step": 1' + b"0" * 400 + b', "loss": 1}', b'{"step": 1, "loss": 1' + b"0" * 400 + b"}",
    b'{"step": 1, "val_nn": {}}',
)  # fmt: skip


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:24].decode(errors="replace"))
def test_a_malformed_line_of_the_log_is_skipped(line: bytes, tmp_path: Path) -> None:
    good = [MetricsRow(1, {"epoch": 0.1, "loss": 2.0}), MetricsRow(2, {"epoch": 0.2, "val_nn": 50.0})]
    written = [json.dumps(row.to_json()).encode() for row in good]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([written[0], line, written[1]]) + b"\n")
    assert read_metrics(Folder(tmp_path)) == good
    with MetricsLog(tmp_path, 1) as log:
        log.write(MetricsRow(2, {"loss": 1.0}))
    kept = (tmp_path / "metrics.jsonl").read_bytes()
    assert kept == written[0] + b"\n" + b'{"step": 2, "loss": 1.0}\n'


def test_a_number_that_is_not_finite_is_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "spread": NaN, "loss": Infinity}\n')
    (row,) = read_metrics(Folder(tmp_path))
    assert row.step == 1 and row.loss == float("inf") and row.values["spread"] != row.values["spread"]


def test_training_on_inspect_and_the_page_of_an_evaluation_end_well_with_a_malformed_log(home: Path) -> None:
    log = home / "run/metrics.jsonl"
    log.write_bytes(b"\n".join([*BAD_LINES, log.read_bytes()]))
    described = inspect.run(inspect.Config(str(home / "run")))
    assert described["last logged step"] == 2 and described["finished"]
    shutil.rmtree(home / "run/evaluation")
    score(home)
    assert "training curves" in (home / "run/evaluation/report.html").read_text()
    repeat(home, steps=4)
    assert [row.step for row in read_metrics(Folder(home / "run"))] == [1, 2, 4]
    assert len(log.read_bytes().splitlines()) == 3
