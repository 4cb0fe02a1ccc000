"""The demo: its teacher has the documented weights and size, and the three stages end in the table."""

import contextlib
import hashlib
import io
import json
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch

from compress_ssl import cli
from compress_ssl.pipeline.models import build
from compress_ssl.pipeline.models.networks.digits import WEIGHTS
from compress_ssl.pipeline.runtime.artifact import Mismatch
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.records import to_json
from compress_ssl.stages import demo

# SHA-256 of digits.safetensors
FILE_DIGEST = "154b42cf8b96c1231fd461cf2f526ea5cf889b32a2e8a2d5520e79605695e037"
# digest of its weights in manifests
WEIGHTS_DIGEST = "82b82763719e3f9c5e90ff4ed7040ded9c481b2a8ac2f34cfe0210277711c06f"

A, B = demo.STUDENTS
NAMES = ["teacher", A, B, f"{A}, untrained", f"{B}, untrained", "raw pixels"]


def count_parameters(spec: str) -> int:
    return sum(p.numel() for p in build(spec, image_size=demo.SIZE).backbone.parameters())


def test_the_weights_file_of_the_teacher_is_unchanged_and_holds_every_parameter() -> None:
    assert WEIGHTS.stat().st_size <= 1_000_000
    assert hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() == FILE_DIGEST
    teacher = build(demo.TEACHER, pretrained_default=True)
    assert teacher.digest() == WEIGHTS_DIGEST
    assert set(safetensors.torch.load_file(WEIGHTS)) == set(teacher.backbone.state_dict())
    assert build(demo.TEACHER).digest() != WEIGHTS_DIGEST


def test_students_have_a_tenth_of_the_teachers_parameters_and_at_most_32_dimensions() -> None:
    assert count_parameters(demo.TEACHER) <= 250_000
    for spec in demo.STUDENTS:
        assert count_parameters(spec) * 10 <= count_parameters(demo.TEACHER)
        assert build(spec, image_size=demo.SIZE).width <= 32


class Demo(NamedTuple):
    """A finished demo: its folder, what `demo.run` returned, and what was printed to stderr."""

    out: Path
    result: dict[str, Any]
    stderr: str

    def column(self, key: str) -> dict[str, float]:
        return {row["name"]: row[key] for row in self.result["rows"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """A small demo: one epoch and two views."""
    out, stderr = tmp_path_factory.mktemp("demo"), io.StringIO()
    with contextlib.redirect_stderr(stderr), pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "VIEWS", 2)
        return Demo(out, demo.run(demo.Config(out=out, epochs=1)), stderr.getvalue())


def test_the_table_lists_the_teacher_the_students_trained_and_untrained_and_raw_pixels(finished: Demo) -> None:
    assert [row["name"] for row in finished.result["rows"]] == NAMES
    lines = finished.result["summary"].splitlines()
    assert [line[: len(name)] for line, name in zip(lines[2:], NAMES, strict=False)] == NAMES
    assert "cluster alignment" in finished.result["summary"]
    assert lines[-1] == f"demo made in {lines[-1].partition(' in ')[2].partition(':')[0]}: {finished.out}"


def test_every_report_named_in_the_summary_exists(finished: Demo) -> None:
    pages = [line.split("  ")[0] for line in finished.result["summary"].splitlines() if ".html" in line]
    assert len(pages) == len(NAMES) + 1
    assert all(Path(page).stat().st_size > 10_000 for page in pages)


def test_the_printed_commands_can_be_typed_by_a_user(finished: Demo) -> None:
    commands = [shlex.split(line[2:]) for line in finished.stderr.splitlines() if line.startswith("$ ")]
    assert [words[1] for words in commands] == ["export-teacher", "distill", *["evaluate"] * len(NAMES), "compare"]
    for _, name, *flags in commands:
        module, summary = cli.COMMANDS[name]
        cli._command(name, module, summary).make_context(name, flags)  # raises for an unknown flag


def test_the_teacher_groups_digits_better_than_raw_pixels_do(finished: Demo) -> None:
    cluster, mean = finished.column("cluster"), finished.column("cluster_mean")
    assert cluster["teacher"] > 92 > cluster["raw pixels"]
    assert mean["teacher"] > mean["raw pixels"] + 8
    assert finished.column("nn")["teacher"] > 98


def test_one_epoch_already_groups_digits_better_than_none(finished: Demo) -> None:
    mean = finished.column("cluster_mean")
    for student in demo.STUDENTS:
        assert mean[student] > mean[f"{student}, untrained"] + 3


def test_an_untrained_student_is_the_student_before_its_first_step(finished: Demo) -> None:
    for student in demo.STUDENTS:
        folder = finished.out / "students" / "".join(c if c.isalnum() or c in "-_." else "-" for c in student)
        initial = demo.artifact.read(demo.Folder(folder), "run").identity["student"]["initial"]
        untrained = demo.artifact.read(demo.Folder(finished.out / "untrained" / folder.name), "evaluation")
        assert untrained.identity["model"]["weights"] == initial


@pytest.fixture
def two_views(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "VIEWS", 2)


@pytest.mark.usefixtures("two_views")
def test_the_same_command_again_runs_no_stage(finished: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "run_stages", None)
    assert "is finished already" in demo.run(demo.Config(out=finished.out))["summary"], "the epochs are recorded"
    repeated = demo.run(demo.Config(out=finished.out, epochs=1))
    assert repeated["rows"] == finished.result["rows"]
    assert repeated["summary"].splitlines()[-1] == f"demo is finished already: {finished.out}"


@pytest.mark.usefixtures("two_views")
def test_a_demo_with_other_epochs_and_a_folder_with_other_files_are_refused(finished: Demo, tmp_path: Path) -> None:
    with pytest.raises(Mismatch, match="epochs is 1.0 there, 2.0 asked"):
        demo.run(demo.Config(out=finished.out, epochs=2))
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        demo.run(demo.Config(out=tmp_path))


@pytest.mark.usefixtures("two_views")
@pytest.mark.parametrize("damage", ["{", "{}", "[1]", '[{"name": 5}]', "[" * 100_000])
def test_a_damaged_table_of_results_is_refused_in_words(finished: Demo, damage: str) -> None:
    table = finished.out / demo.RESULTS
    content = table.read_bytes()
    table.write_text(damage)
    try:
        with pytest.raises(UserError, match=r"results.json is (damaged|not valid)"):
            demo.run(demo.Config(out=finished.out, epochs=1))
    finally:
        table.write_bytes(content)


def test_the_table_on_disk_is_written_back_as_it_was_read(finished: Demo) -> None:
    content = (finished.out / demo.RESULTS).read_bytes()
    rows = [demo.Row(**row) for row in json.loads(content)]
    assert json.dumps(to_json(rows), indent=1).encode() + b"\n" == content


@pytest.mark.usefixtures("two_views")
def test_a_deleted_report_is_written_again(finished: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    page = finished.out / "pixels" / "report.html"
    content = page.read_bytes()

    def run_stages(out: Path, epochs: float) -> tuple[demo.Row, ...]:
        page.write_bytes(content)
        return tuple(demo.Row(**row) for row in finished.result["rows"])

    page.unlink()
    monkeypatch.setattr(demo, "run_stages", run_stages)
    assert "made in" in demo.run(demo.Config(out=finished.out, epochs=1))["summary"]
    assert page.exists()


@pytest.mark.soak
def test_the_full_demo_trains_both_students_to_cluster_digits(tmp_path: Path) -> None:
    result = demo.run(demo.Config(out=tmp_path))
    cluster, mean = ({row["name"]: row[key] for row in result["rows"]} for key in ("cluster", "cluster_mean"))
    nn = {row["name"]: row["nn"] for row in result["rows"]}
    for student in demo.STUDENTS:
        assert cluster[student] > max(90, cluster["raw pixels"])
        assert mean[student] > mean[f"{student}, untrained"] + 10
        assert nn[student] > nn[f"{student}, untrained"] + 2
