"""What a launcher tells its processes is read as numbers in their ranges, or refused in words."""

import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from compress_ssl.pipeline.distributed import collectives, launch
from compress_ssl.pipeline.runtime import launch_env
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.launch_env import Launch

GOOD = {
    "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip


def set_variables(monkeypatch: pytest.MonkeyPatch, **changes: str) -> None:
    for name, value in {**GOOD, **changes}.items():
        monkeypatch.setenv(name, value)


def test_the_variables_of_torchrun_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch)
    assert launch_env.read_launch() == Launch(3, 8, 1, 2, "127.0.0.1", 29500)
    assert (launch_env.local_rank(), launch_env.local_world_size()) == (1, 2)
    assert launch_env.is_launched() and not launch_env.is_main_process()


@pytest.mark.parametrize("changes", [{"WORLD_SIZE": "1"}, {"WORLD_SIZE": "0"}])
def test_a_process_alone_needs_no_valid_variables(monkeypatch: pytest.MonkeyPatch, changes: dict[str, str]) -> None:
    set_variables(monkeypatch, RANK="x", MASTER_PORT="y", **changes)
    assert launch_env.read_launch() is None and not launch_env.is_launched() and launch_env.is_main_process()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR")
    assert launch_env.read_launch() is None, "one variable is missing: nobody launched this process"


WRONG = [
    *({name: value} for name in sorted({*GOOD} - {"MASTER_ADDR"}) for value in ("abc", "", "-1", "1.5", "9" * 5000)),
    {"RANK": "8"}, {"LOCAL_RANK": "8"}, {"LOCAL_WORLD_SIZE": "0"}, {"LOCAL_WORLD_SIZE": "9"}, {"MASTER_PORT": "65536"},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: str(wrong)[:40])
def test_a_value_that_cannot_be_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch, wrong: dict[str, str]) -> None:
    set_variables(monkeypatch, **wrong)
    (name,) = wrong
    with (
        pytest.raises(UserError, match=f"the environment variable {name} is .*, but must be a whole number") as refused,
        collectives.process_group(),
    ):
        pass
    assert len(str(refused.value)) < 400


def test_a_rank_that_reaches_no_other_says_where_it_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]  # nobody listens on it
    set_variables(monkeypatch, RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", MASTER_PORT=str(port))
    monkeypatch.setattr(collectives, "TIMEOUT", timedelta(seconds=1))
    with (
        pytest.raises(
            UserError, match=rf"rank 1 cannot join the others by way of 127.0.0.1:{port} \(Dist.*check MASTER"
        ),
        collectives.process_group(),
    ):
        pass


def test_a_command_with_a_malformed_launcher_ends_in_words(tmp_path: Path) -> None:
    words = ["distill", "--store", str(tmp_path), "--student", "convnet", "--method", "seed", "--out", "x"]
    variables = {**os.environ, **GOOD, "WORLD_SIZE": "abc", "RANK": "0"}
    ended = subprocess.run(
        [sys.executable, "-m", "compress_ssl", *words], env=variables, cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "error: the environment variable WORLD_SIZE is 'abc'" in ended.stderr


@pytest.mark.parametrize(("signum", "name"), [(9, "SIGKILL"), (40, "signal 40")])
def test_every_signal_that_kills_a_rank_has_a_name(signum: int, name: str) -> None:
    assert launch._signal_name(signum) == name
