"""Jobs that share a pass over the images: what they may differ in, and what an error of one means for the others."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.stages import distill, export_teacher, sweep

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("store") / "store"
    teacher = "convnet:channels=4+8,pretrained=false"
    flags: dict[str, Any] = {"views": 4, "image_size": 8, "limit": 40, "workers": 0, "device": "cpu"}
    export_teacher.run(export_teacher.Config("digits", teacher, str(out), **flags))
    return out


@pytest.fixture
def config(store: Path, tmp_path: Path) -> Callable[..., distill.Config]:
    """config("name", ...): a command that trains in tmp_path/name."""

    def config(name: str, **flags: Any) -> distill.Config:
        usual: dict[str, Any] = {
            "student": ("convnet:channels=4",), "method": "regression", "steps": 2, "image_size": 8, "workers": 0,
            "device": "cpu",
        }  # fmt: skip
        return distill.Config(store=str(store), out=tmp_path / name, **{**usual, **flags})

    return config


def runs(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("*/manifest.json"))


def jobs(*configs: distill.Config) -> list[distill.Job]:
    return [distill.resolve(each) for each in configs]


def test_jobs_share_a_pass_if_they_differ_in_what_belongs_to_a_student_only(config: Callable[..., Any]) -> None:
    one = distill.resolve(config("one"))
    same: list[dict[str, Any]] = [
        {"lr": 0.5}, {"precision": "bf16"}, {"method": "compress-1q:bank=4"}, {"ema": 0.5}, {"image_size": 16},
        {"channels_last": False}, {"student": ("convnet:channels=3", "convnet:channels=5")}, {"schedule": "cosine"},
    ]  # fmt: skip
    for flags in same:
        assert distill.resolve(config("other", **flags)).data_pass_key == one.data_pass_key, flags
    others: list[dict[str, Any]] = [
        {"seed": 1}, {"steps": 3}, {"batch_size": 10}, {"views": 3}, {"pairing": "cross"}, {"views_per_step": 2},
        {"workers": 1}, {"val": "digits"},
    ]  # fmt: skip
    for flags in others:
        assert distill.resolve(config("other", **flags)).data_pass_key != one.data_pass_key, flags


def test_jobs_of_other_images_views_or_steps_cannot_share_a_pass_and_nothing_is_made(
    config: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(distill.CannotSharePass, match="two needs other images, views or steps than"):
        distill.train_together(jobs(config("one"), config("two", seed=1)))
    assert runs(tmp_path) == []


def test_students_that_were_begun_with_other_views_are_to_be_continued_separately(
    config: Callable[..., Any], tmp_path: Path
) -> None:
    one, other = "convnet:channels=4", "convnet:channels=5"
    distill.run(config("both", student=(one, other)))
    distill.run(config("both/convnet-channels-5", student=(other,), views=3, overwrite=True))
    with pytest.raises(distill.CannotSharePass, match="convnet-channels-5 was begun with other .* separate commands"):
        distill.run(config("both", student=(one, other), steps=4))
    distill.run(config("both", student=(other,), steps=4))


def test_an_error_of_one_job_leaves_all_to_be_run_separately_while_nothing_has_been_moved(
    config: Callable[..., Any], tmp_path: Path
) -> None:
    distill.run(config("good"))
    with pytest.raises(distill.CannotSharePass, match="bank=99 was asked"):
        distill.train_together(jobs(config("good", overwrite=True), config("bad", method="seed:bank=99")))
    assert runs(tmp_path) == ["good"]
    with pytest.raises(distill.CannotSharePass, match="training.lr is"):
        distill.train_together(jobs(config("new"), config("good", lr=0.7)))


def test_an_error_after_runs_were_moved_aside_is_raised_as_it_is(config: Callable[..., Any], tmp_path: Path) -> None:
    """Running the jobs separately would move the run aside that has just been begun in its place."""
    distill.run(config("one"))
    distill.run(config("two"))
    with pytest.raises(UserError, match="training.lr is") as error:
        distill.train_together(jobs(config("one", overwrite=True), config("two", lr=0.7)))
    assert not isinstance(error.value, distill.CannotSharePass)
    assert runs(tmp_path) == ["one", "one.old-1", "two"]
    assert distill.run(config("one"))["steps"] == 2


def test_a_sweep_resolves_each_command_once(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, store: Path
) -> None:
    resolved, resolve = [], distill.resolve
    monkeypatch.setattr(distill, "resolve", lambda each: (resolved.append(each.out), resolve(each))[1])
    cells = [sweep.Cell(name, replace(config(name), method=name)) for name in ("regression", "compress-1q")]
    (group,) = sweep.group_into_passes(cells, None)
    assert sweep.train(group) == {}
    assert sorted(out.name for out in resolved) == ["compress-1q", "regression"]
