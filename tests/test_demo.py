"""The demo: its teacher is what it says, and the three stages end in the table."""

import hashlib
from pathlib import Path

import pytest

from pipeline.models import build
from pipeline.teachers.digits import WEIGHTS
from stages import demo

DIGEST = "154b42cf8b96c1231fd461cf2f526ea5cf889b32a2e8a2d5520e79605695e037"


def test_the_teachers_weights_are_the_ones_published() -> None:
    assert WEIGHTS.stat().st_size <= 1_000_000
    assert hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() == DIGEST


def test_students_have_a_tenth_of_the_teachers_parameters_and_at_most_32_dimensions() -> None:
    teacher = build(demo.TEACHER, pretrained_default=True)
    count = sum(p.numel() for p in teacher.backbone.parameters())
    for spec in demo.STUDENTS:
        student = build(spec, image_size=demo.SIZE)
        assert sum(p.numel() for p in student.backbone.parameters()) * 10 <= count
        assert student.width <= 32


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("demo")
    return out, demo.run(demo.Config(out=out, epochs=2))


def test_it_ends_with_teacher_students_their_untrained_selves_and_raw_pixels(made: tuple[Path, dict]) -> None:
    out, result = made
    names = [row["name"] for row in result["rows"]]
    a, b = demo.STUDENTS
    assert names == ["teacher", "raw pixels", a, f"{a}, untrained", b, f"{b}, untrained"]
    assert all(name in result["summary"] for name in names)
    assert (out / "compare.html").exists() and str(out / "compare.html") in result["summary"]


def test_the_teacher_groups_digits_better_than_raw_pixels(made: tuple[Path, dict]) -> None:
    scores = {row["name"]: row["cluster"] for row in made[1]["rows"]}
    assert scores["teacher"] > scores["raw pixels"] + 5


def test_two_epochs_already_group_digits_better_than_no_training(made: tuple[Path, dict]) -> None:
    scores = {row["name"]: row["cluster"] for row in made[1]["rows"]}
    for student in demo.STUDENTS:
        assert scores[student] > scores[f"{student}, untrained"] + 3


def test_the_same_command_again_trains_nothing(made: tuple[Path, dict]) -> None:
    out, before = made
    stamp = (out / "students").stat().st_mtime_ns
    assert demo.run(demo.Config(out=out, epochs=2))["rows"] == before["rows"]
    assert (out / "students").stat().st_mtime_ns == stamp
