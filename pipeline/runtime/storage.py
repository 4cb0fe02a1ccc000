"""Storage: get, put, put-if-absent and list, in a local folder or an object store.

All files that are not Zarr arrays are read and written through it.
"""

import errno
import os
import platform
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.process import start_time

PART = ".part"  # suffix of files that are being written; a killed writer leaves them behind, and `list` omits them
_WRITER = re.compile(r"\.[0-9a-f]{8}\.(\d+)\.(.*)\.part$")  # groups: PID and host name of the writer
INTERRUPTED = {errno.EINTR, errno.ESTALE}  # errors of network file systems that are gone when the call is repeated
PAUSES = (0.05, 0.5, 2.0)  # seconds before each repetition of an interrupted call
_DAY = 86_400.0  # seconds; the age after which a part file of another machine is assumed to be abandoned


class Storage(Protocol):
    """A mapping from keys ("done/000.json") to bytes. A put is atomic: readers see all of the data or none."""

    def get(self, key: str) -> bytes:
        """The bytes of a key. Raises FileNotFoundError."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write a key, or replace it."""
        ...

    def put_new(self, key: str, data: bytes) -> bool:
        """Write a key only if it is absent; False if it was present.

        The data must contain a token unique to the caller: an object store compares the stored data with it to
        find out who wrote first.
        """
        ...

    def delete(self, key: str) -> None:
        """Delete a key; an absent key is no error."""
        ...

    def exists(self, key: str) -> bool:
        """Whether the key is present."""
        ...

    def modified(self, key: str) -> float:
        """The time of the last write, in seconds since the epoch. Raises FileNotFoundError."""
        ...

    def list(self, prefix: str = "") -> Iterator[str]:
        """The keys below a folder prefix ("done"), in no particular order."""
        ...

    def size(self) -> int:
        """The total size in bytes of all keys."""
        ...

    def __str__(self) -> str: ...


def open_storage(where: str | os.PathLike[str]) -> Storage:
    """The storage for a path or a URL (s3://, gs://, az://, memory://).

    Raises UserError if a bucket cannot be reached or refuses access.
    """
    text = os.fspath(where)
    if not is_url(text):
        return Folder(text.removeprefix("file://"))
    from compress_ssl.pipeline.runtime.object_store import Bucket

    bucket = Bucket(text)
    bucket.check_access()
    return bucket


def is_url(where: str | os.PathLike[str]) -> bool:
    """Whether a location is in an object store: it begins with a scheme and ://, but not with file://."""
    return re.match(r"(?!file://)[a-z][a-z0-9+.-]*://", os.fspath(where)) is not None


def absolute(where: str | os.PathLike[str]) -> str:
    """A location that does not depend on the working directory: an absolute path, or the URL unchanged."""
    return os.fspath(where) if is_url(where) else str(Folder(os.fspath(where).removeprefix("file://")).path.absolute())


def local_path(text: str | os.PathLike[str]) -> Path:
    """A path in which a beginning `~` is the home folder. Raises UserError if there is no such user, and for a NUL."""
    if "\0" in os.fspath(text):
        raise UserError(f"{os.fspath(text)!r} holds a NUL character, and no path can; take it out")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{os.fspath(text)}: the home folder is unknown; write the whole path") from None


class Folder:
    """Storage in a local folder. A put writes a part file, fsyncs it, renames it and fsyncs the folder."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = local_path(path)

    def __str__(self) -> str:
        return str(self.path)

    def get(self, key: str) -> bytes:
        return (self.path / key).read_bytes()

    def put(self, key: str, data: bytes) -> None:
        target = self.path / key
        replace_file(self._write_part(target, data), target)
        sync(target.parent)

    def put_new(self, key: str, data: bytes) -> bool:
        target = self.path / key
        part = self._write_part(target, data)
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
        """Delete the part files of ended writers; returns their number.

        Whether a writer on another machine has ended is unknown: its part files are deleted when they are a day old.
        """
        count = 0
        for part in self.path.rglob(f"*{PART}"):
            writer = _WRITER.search(part.name)
            try:
                dead = writer and writer[2] == platform.node() and start_time(int(writer[1])) is None
                if dead or part.stat().st_mtime < time.time() - _DAY:
                    part.unlink()
                    count += 1
            except FileNotFoundError:
                continue  # the writer was running and has just renamed the file
        return count

    def _write_part(self, target: Path, data: bytes) -> Path:
        """Write and fsync a part file next to `target`; returns its path."""
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
                problem.filename = str(target)  # errors of write() and fsync() carry no file name
            raise
        return part


def replace_file(part: Path, target: Path) -> None:
    """Rename a finished part file to its target, which is replaced. A rename that is interrupted is repeated."""
    for attempt, pause in enumerate((*PAUSES, None)):
        try:
            os.replace(part, target)
            return
        except FileNotFoundError:
            if attempt and not part.exists():
                return  # the interrupted rename had been done: nobody else knows the part file's name
            raise
        except OSError as problem:
            if problem.errno not in INTERRUPTED or pause is None:
                raise
            time.sleep(pause)


def sync(path: Path) -> None:
    """fsync a file or folder. Folders on file systems without fsync (some network mounts) are skipped."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as problem:
        if problem.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)
