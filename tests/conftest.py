"""What every test runs under. Nothing here imports torch: a test that needs it pays for it."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from object_store import Server

side_by_side = "PYTEST_XDIST_WORKER" in os.environ  # a process for each core, then
os.environ.setdefault("OMP_NUM_THREADS", "1" if side_by_side else str(min(4, os.cpu_count() or 1)))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as cli.main says: spinning threads starve the others
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network fails at once, it does not hang

settings.register_profile("house", deadline=None, derandomize=True)  # busy machines; the same examples
settings.load_profile("house")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread for torch: small networks are faster so, and sums come out the same."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def _server() -> Iterator["Server"]:
    from object_store import serving

    with serving() as server:
        yield server


@pytest.fixture
def server(_server: "Server", monkeypatch: pytest.MonkeyPatch) -> Iterator["Server"]:
    """A real S3 server on loopback that this process and its children know of."""
    for name, value in _server.environment.items():
        monkeypatch.setenv(name, value)
    _server.calm()
    yield _server
    _server.calm()


@pytest.fixture
def bucket(server: "Server", request: pytest.FixtureRequest) -> str:
    """s3://NAME of a new bucket."""
    return server.bucket(f"b{abs(hash(request.node.nodeid))}")
