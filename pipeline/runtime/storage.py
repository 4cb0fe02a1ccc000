"""Get, put, list, put-if-absent: the one way to the disk for all that is not Zarr."""

import errno
import os
import platform
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from compress_ssl.pipeline.runtime.process import began

PART = ".part"  # what a killed writer leaves behind ends in this; readers never see it
_WRITER = re.compile(r"\.[0-9a-f]{8}\.(\d+)\.(.*)\.part$")  # process, machine
_DAY = 86_400.0  # seconds


class Storage(Protocol):
    """A flat space of keys ("done/000.json") and bytes. Every put is whole or not there at all."""

    def get(self, key: str) -> bytes:
        """Raises FileNotFoundError."""
        ...

    def put(self, key: str, data: bytes) -> None: ...

    def put_new(self, key: str, data: bytes) -> bool:
        """Put if absent; False if somebody was there first. The data should be nobody else's: hold a token."""
        ...

    def delete(self, key: str) -> None:
        """Nothing happens if it is not there."""
        ...

    def exists(self, key: str) -> bool: ...

    def modified(self, key: str) -> float:
        """When it was put there, in seconds of the epoch. Raises FileNotFoundError."""
        ...

    def list(self, prefix: str = "") -> Iterator[str]:
        """Keys below a folder prefix ("done"), in no order."""
        ...

    def size(self) -> int:
        """Bytes of all that `list` names."""
        ...

    def __str__(self) -> str: ...


def open_storage(where: str | os.PathLike[str]) -> Storage:
    """A folder, or for a URL (s3://, gs://, az://, memory://) a bucket that answers. Raises UserError."""
    text = os.fspath(where)
    if not is_url(text):
        return Folder(text.removeprefix("file://"))
    from compress_ssl.pipeline.runtime.object_store import Bucket

    bucket = Bucket(text)
    bucket.check_access()
    return bucket


def is_url(where: str | os.PathLike[str]) -> bool:
    """Whether a place is in an object store: a scheme and ://, file:// apart."""
    return re.match(r"(?!file://)[a-z][a-z0-9+.-]*://", os.fspath(where)) is not None


def absolute(where: str | os.PathLike[str]) -> str:
    """A place so that it holds from any working directory; a URL does as it is."""
    return os.fspath(where) if is_url(where) else str(Folder(os.fspath(where).removeprefix("file://")).path.absolute())


class Folder:
    """Storage in a local folder: written beside, fsynced, renamed, and the folder fsynced."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path).expanduser()

    def __str__(self) -> str:
        return str(self.path)

    def get(self, key: str) -> bytes:
        return (self.path / key).read_bytes()

    def put(self, key: str, data: bytes) -> None:
        target = self.path / key
        part = self._beside(target, data)
        os.replace(part, target)
        sync(target.parent)

    def put_new(self, key: str, data: bytes) -> bool:
        target = self.path / key
        part = self._beside(target, data)
        try:
            os.link(part, target)
        except FileExistsError:
            return False
        finally:
            part.unlink()
        sync(target.parent)
        return True

    def delete(self, key: str) -> None:
        (self.path / key).unlink(missing_ok=True)

    def exists(self, key: str) -> bool:
        return (self.path / key).exists()

    def modified(self, key: str) -> float:
        return (self.path / key).stat().st_mtime

    def list(self, prefix: str = "") -> Iterator[str]:
        top = str(self.path / prefix) if prefix else str(self.path)
        for folder, _, names in os.walk(top):
            base = os.path.relpath(folder, self.path)
            for name in names:
                if not name.endswith(PART):
                    yield name if base == "." else f"{base}/{name}"

    def size(self) -> int:
        return sum((self.path / key).stat().st_size for key in self.list())

    def sweep(self) -> int:
        """Delete what killed writers left; how many. Of another machine's only what is a day old: it may be alive."""
        count = 0
        for part in self.path.rglob(f"*{PART}"):
            writer = _WRITER.search(part.name)
            try:
                dead = writer and writer[2] == platform.node() and began(int(writer[1])) is None
                if dead or part.stat().st_mtime < time.time() - _DAY:
                    part.unlink()
                    count += 1
            except FileNotFoundError:
                continue  # its writer was alive and has just renamed it
        return count

    def _beside(self, target: Path, data: bytes) -> Path:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.{os.getpid()}.{platform.node()}{PART}")
        try:
            with open(part, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException as problem:
            part.unlink(missing_ok=True)
            if isinstance(problem, OSError) and problem.filename is None:
                problem.filename = str(target)  # a full disk does not say which
            raise
        return part


def sync(path: Path) -> None:
    """fsync a file or folder; a folder that cannot be synced (some network mounts) is let be."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as problem:
        if problem.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)
