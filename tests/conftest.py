"""Environment variables and fixtures of all tests. Nothing here imports torch, which takes seconds."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from object_store import Server

parallel = "PYTEST_XDIST_WORKER" in os.environ  # pytest-xdist then runs one process per core
os.environ.setdefault("OMP_NUM_THREADS", "1" if parallel else str(min(4, os.cpu_count() or 1)))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in cli.main: threads that spin slow the others down
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that uses the network fails at once instead of hanging

# no deadline, as machines may be busy; the same examples in every run
settings.register_profile("compress", deadline=None, derandomize=True)
settings.load_profile("compress")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Run torch with one thread: small networks are faster, and sums have the same bits."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def _server() -> Iterator["Server"]:
    from object_store import running_server

    with running_server() as server:
        yield server


@pytest.fixture
def server(_server: "Server", monkeypatch: pytest.MonkeyPatch) -> Iterator["Server"]:
    """An S3 server on the loopback interface; this process and its children find it by their environment."""
    for name, value in _server.environment.items():
        monkeypatch.setenv(name, value)
    _server.calm()
    yield _server
    _server.calm()


@pytest.fixture
def bucket(server: "Server", request: pytest.FixtureRequest) -> str:
    """The URL s3://NAME of a new bucket."""
    return server.bucket(f"b{abs(hash(request.node.nodeid))}")
