"""Checkpoints: written completely or not at all, restored completely or not at all."""

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.pipeline.training import checkpoint


def make_parts(value: float = 0.0, **more: Any) -> dict[str, Any]:
    student = nn.Linear(2, 1, bias=False)
    nn.init.constant_(student.weight, value)
    optimizer = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9)
    return {"student": student, "optimizer": optimizer, "average": None, "best": value, **more}


def weight_of(parts: dict[str, Any]) -> float:
    return float(parts["student"].weight.detach()[0, 0])


def file_names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_saved_parts_are_restored_by_name(tmp_path: Path) -> None:
    saved, restored = make_parts(3.0), make_parts(0.0)
    saved["student"].weight.grad = torch.ones(1, 2)
    saved["optimizer"].step()
    checkpoint.save(tmp_path, 7, saved)
    content = checkpoint.restore(tmp_path / "last.pt", restored)
    assert torch.equal(restored["student"].weight, saved["student"].weight)
    (momentum,) = (state["momentum_buffer"] for state in restored["optimizer"].state.values())
    assert torch.equal(momentum, torch.ones(1, 2))
    assert (content["step"], content["best"], content["average"]) == (7, 3.0, None)


def test_only_the_latest_checkpoints_are_kept_and_last_is_the_newest(tmp_path: Path) -> None:
    for step in (5, 10, 12, 100):
        checkpoint.save(tmp_path, step, make_parts(float(step)))
        assert checkpoint.load(tmp_path / "last.pt")["step"] == step
        assert len(checkpoint.list_steps(tmp_path)) <= checkpoint.KEEP
    assert checkpoint.list_steps(tmp_path) == [12, 100]
    assert file_names(tmp_path) == ["last.pt", "step-00000012.pt", "step-00000100.pt"]
    assert os.path.samefile(tmp_path / "last.pt", tmp_path / "step-00000100.pt"), (
        "last.pt must be a hard link, not a copy"
    )


def test_without_hard_links_last_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no hard links")))
    checkpoint.save(tmp_path, 3, make_parts())
    assert (tmp_path / "last.pt").read_bytes() == (tmp_path / "step-00000003.pt").read_bytes()


def test_after_resuming_from_an_earlier_step_the_first_save_deletes_later_checkpoints(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, step, make_parts())
    (tmp_path / "step-00000030.pt").write_bytes(b"damaged")
    checkpoint.save(tmp_path, 25, make_parts())
    assert checkpoint.list_steps(tmp_path) == [20, 25]


def test_a_folder_without_checkpoints_has_no_steps(tmp_path: Path) -> None:
    (tmp_path / ".step-00000001.pt.1234.part").touch()
    (tmp_path / "best.pt").touch()
    assert checkpoint.list_steps(tmp_path) == []
    assert checkpoint.list_steps(tmp_path / "not there") == []


class Crash(BaseException):
    """Stands for the death of the process: no code of ours catches it."""


@pytest.mark.parametrize("where", ["write", "replace", "link", "before the link is moved", "delete"])
def test_after_a_crash_while_saving_the_old_or_the_new_checkpoint_can_be_restored(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20):
        checkpoint.save(tmp_path, step, make_parts(float(step)))

    def crash(*_: Any, **__: Any) -> None:
        raise Crash

    replace = os.replace
    with monkeypatch.context() as patch:
        if where == "write":
            patch.setattr(os, "fsync", crash)
        elif where == "replace":
            patch.setattr(os, "replace", crash)
        elif where == "link":
            patch.setattr(os, "link", crash)
        elif where == "before the link is moved":
            patch.setattr(os, "replace", lambda a, b: crash() if Path(b).name == "last.pt" else replace(a, b))
        else:
            patch.setattr(Folder, "delete", crash)
        with pytest.raises(Crash):
            checkpoint.save(tmp_path, 30, make_parts(30.0))
    for name in [*(f"step-{step:08d}.pt" for step in checkpoint.list_steps(tmp_path)), "last.pt"]:
        restored = make_parts()
        step = checkpoint.restore(tmp_path / name, restored)["step"]
        assert weight_of(restored) == step
    assert checkpoint.list_steps(tmp_path)[-1] == (20 if where in ("write", "replace") else 30)
    checkpoint.save(tmp_path, 40, make_parts(40.0))
    assert checkpoint.list_steps(tmp_path) == [{"write": 20, "replace": 20}.get(where, 30), 40]
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 40


def tensor_offset(file: Path) -> int:
    """Offset in bytes of the first tensor's data. A zip entry has a header of 30 bytes, a name and an extra field."""
    with zipfile.ZipFile(file) as archive:
        (record,) = (i for i in archive.infolist() if i.filename.endswith("data/0"))
    data = file.read_bytes()
    lengths = (int.from_bytes(data[record.header_offset + field :][:2], "little") for field in (26, 28))
    return record.header_offset + 30 + sum(lengths)


def flip_bit(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 0x10
    file.write_bytes(data)


DAMAGES = ["empty", "cut short", "not a checkpoint", "a flipped bit in a tensor", "a flipped bit in the zip's table"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_and_nothing_is_loaded(damage: str, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 7, make_parts(3.0))
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
        flip_bit(file, tensor_offset(file) + 1 if damage == "a flipped bit in a tensor" else len(data) - 60)
    restored = make_parts(1.0)
    with pytest.raises(UserError, match="step-00000007.pt is damaged .*; delete it to continue from an earlier one"):
        checkpoint.restore(file, restored)
    assert weight_of(restored) == 1.0, "nothing was loaded"


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="last.pt does not exist"):
        checkpoint.restore(tmp_path / "last.pt", make_parts())


def test_a_file_that_would_run_code_is_refused_and_does_not_run_it(tmp_path: Path) -> None:
    class RunsCode:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "made_by_code"),)

    torch.save({"step": 1, "student": RunsCode()}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(tmp_path / "last.pt")
    assert not (tmp_path / "made_by_code").exists()


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        ("missing", "checkpoint and run differ in scaler"),
        ("superfluous", "checkpoint and run differ in average"),
        ("shape", "student: .*size mismatch"),
        ("keys", "student: .*Missing key"),
        ("nothing", "average: "),
    ],
)
def test_a_part_that_is_missing_superfluous_or_does_not_fit_is_refused(
    problem: str, words: str, tmp_path: Path
) -> None:
    checkpoint.save(tmp_path, 7, make_parts(3.0))
    restored = make_parts(1.0)
    if problem == "missing":
        restored["scaler"] = torch.amp.GradScaler(enabled=False)
    elif problem == "superfluous":
        del restored["average"]
    elif problem == "shape":
        restored["student"] = nn.Linear(3, 1, bias=False)
    elif problem == "keys":
        restored["student"] = nn.Linear(2, 1, bias=True)
    else:
        restored["average"] = nn.Linear(2, 1)
    with pytest.raises(UserError, match=f"does not fit this run: {words}"):
        checkpoint.restore(tmp_path / "last.pt", restored)
