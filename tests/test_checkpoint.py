"""Checkpoints: whole or not there, restored whole or not at all."""

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.training import checkpoint


def parts(value: float = 0.0, **more: Any) -> dict[str, Any]:
    student = nn.Linear(2, 1, bias=False)
    nn.init.constant_(student.weight, value)
    optimizer = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9)
    return {"student": student, "optimizer": optimizer, "average": None, "best": value, **more}


def value(of: dict[str, Any]) -> float:
    return float(of["student"].weight.detach()[0, 0])


def files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_what_is_saved_comes_back_by_name(tmp_path: Path) -> None:
    saved, there = parts(3.0), parts(0.0)
    saved["student"].weight.grad = torch.ones(1, 2)
    saved["optimizer"].step()
    checkpoint.save(tmp_path, 7, saved)
    whole = checkpoint.restore(tmp_path / "last.pt", there)
    assert torch.equal(there["student"].weight, saved["student"].weight)
    (momentum,) = (state["momentum_buffer"] for state in there["optimizer"].state.values())
    assert torch.equal(momentum, torch.ones(1, 2))
    assert (whole["step"], whole["best"], whole["average"]) == (7, 3.0, None)


def test_only_the_latest_few_are_kept_and_last_is_the_newest(tmp_path: Path) -> None:
    for step in (5, 10, 12, 100):
        checkpoint.save(tmp_path, step, parts(float(step)))
        assert checkpoint.load(tmp_path / "last.pt")["step"] == step
        assert len(checkpoint.list_steps(tmp_path)) <= checkpoint.KEEP
    assert checkpoint.list_steps(tmp_path) == [12, 100]
    assert files(tmp_path) == ["last.pt", "step-00000012.pt", "step-00000100.pt"]
    assert os.path.samefile(tmp_path / "last.pt", tmp_path / "step-00000100.pt"), "the disk holds it once"


def test_where_links_are_not_to_be_had_last_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    checkpoint.save(tmp_path, 3, parts())
    assert (tmp_path / "last.pt").read_bytes() == (tmp_path / "step-00000003.pt").read_bytes()


def test_after_going_back_what_came_later_is_gone_with_the_first_save(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, step, parts())
    (tmp_path / "step-00000030.pt").write_bytes(b"damaged")
    checkpoint.save(tmp_path, 25, parts())
    assert checkpoint.list_steps(tmp_path) == [20, 25]


def test_a_folder_without_checkpoints_has_no_steps(tmp_path: Path) -> None:
    (tmp_path / ".step-00000001.pt.1234.part").touch()
    (tmp_path / "best.pt").touch()
    assert checkpoint.list_steps(tmp_path) == []
    assert checkpoint.list_steps(tmp_path / "not there") == []


class Crash(BaseException):
    """The machine stops here."""


@pytest.mark.parametrize("where", ["write", "replace", "link", "before the link is moved", "delete"])
def test_a_crash_while_saving_leaves_the_former_or_the_new_one_to_go_on_from(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20):
        checkpoint.save(tmp_path, step, parts(float(step)))

    def crash(*_: Any, **__: Any) -> None:
        raise Crash

    replace = os.replace
    with monkeypatch.context() as broken:
        if where == "write":
            broken.setattr(os, "fsync", crash)
        elif where == "replace":
            broken.setattr(os, "replace", crash)
        elif where == "link":
            broken.setattr(os, "link", crash)
        elif where == "before the link is moved":
            broken.setattr(os, "replace", lambda a, b: crash() if Path(b).name == "last.pt" else replace(a, b))
        else:
            broken.setattr(Folder, "delete", crash)
        with pytest.raises(Crash):
            checkpoint.save(tmp_path, 30, parts(30.0))
    for name in [*(f"step-{step:08d}.pt" for step in checkpoint.list_steps(tmp_path)), "last.pt"]:
        there = parts()
        step = checkpoint.restore(tmp_path / name, there)["step"]
        assert value(there) == step
    assert checkpoint.list_steps(tmp_path)[-1] == (20 if where in ("write", "replace") else 30)
    checkpoint.save(tmp_path, 40, parts(40.0))
    assert checkpoint.list_steps(tmp_path) == [{"write": 20, "replace": 20}.get(where, 30), 40]
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 40


def place_of_a_tensor(file: Path) -> int:
    """Where the bytes of the first tensor begin."""
    with zipfile.ZipFile(file) as archive:
        (record,) = (i for i in archive.infolist() if i.filename.endswith("data/0"))
    data = file.read_bytes()
    lengths = (int.from_bytes(data[record.header_offset + at :][:2], "little") for at in (26, 28))
    return record.header_offset + 30 + sum(lengths)


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0x10
    file.write_bytes(data)


DAMAGES = ["empty", "cut short", "not a checkpoint", "a flipped bit in a tensor", "a flipped bit in the zip's table"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_in_words(damage: str, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 7, parts(3.0))
    file = tmp_path / "step-00000007.pt"
    data = file.read_bytes()
    file.unlink()
    if damage == "empty":
        file.write_bytes(b"")
    elif damage == "cut short":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "not a checkpoint":
        file.write_bytes(b"hello " * 500)
    else:
        file.write_bytes(data)
        flip(file, place_of_a_tensor(file) + 1 if damage == "a flipped bit in a tensor" else len(data) - 60)
    there = parts(1.0)
    with pytest.raises(UserError, match="step-00000007.pt is damaged .*; delete it to continue from an earlier one"):
        checkpoint.restore(file, there)
    assert value(there) == 1.0, "nothing was loaded"


def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="last.pt does not exist"):
        checkpoint.restore(tmp_path / "last.pt", parts())


def test_a_file_that_would_run_code_is_refused_and_does_not_run_it(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save({"step": 1, "student": Evil()}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(tmp_path / "last.pt")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ("missing", "checkpoint and run differ in scaler"),
        ("left over", "checkpoint and run differ in average"),
        ("shape", "student: .*size mismatch"),
        ("keys", "student: .*Missing key"),
        ("nothing", "average: "),
    ],
)
def test_a_part_that_is_missing_left_over_or_does_not_fit_is_refused(odd: str, words: str, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 7, parts(3.0))
    there = parts(1.0)
    if odd == "missing":
        there["scaler"] = torch.amp.GradScaler(enabled=False)
    elif odd == "left over":
        del there["average"]
    elif odd == "shape":
        there["student"] = nn.Linear(3, 1, bias=False)
    elif odd == "keys":
        there["student"] = nn.Linear(2, 1, bias=True)
    else:
        there["average"] = nn.Linear(2, 1)
    with pytest.raises(UserError, match=f"does not fit this run: {words}"):
        checkpoint.restore(tmp_path / "last.pt", there)
