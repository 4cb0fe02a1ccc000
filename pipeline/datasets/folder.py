"""Image files below a folder."""

import os
import re
import stat
from pathlib import Path

import numpy as np

from compress_ssl.pipeline.datasets.base import Dataset, content_hash
from compress_ssl.pipeline.datasets.decode import TOO_LARGE, UNREADABLE, BadImage, decode
from compress_ssl.pipeline.runtime.errors import UserError

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm .jp2 .avif .ico .tga".split()
)
"""Endings, in lower case, of the files that count as images."""

MAX_BYTES = 2**31  # size limit of one file: decode.MAX_PIXELS pixels need far less, even uncompressed
_RESEMBLES_ESCAPE = re.compile(rb"%(?=25|[89A-F][0-9A-F])")  # a % sign that could be read as one of our escapes
_SPLITS = ("train", "training", "val", "valid", "validation", "test")  # subfolders that are data sets of their own


class Folder(Dataset):
    """Image files, sorted by path; class subfolders give labels.

    The images are labelled if each one lies in a subfolder of `path`: the first folder on its way is its class.
    If any image lies directly in `path`, none is labelled. `labels=false` ignores the subfolders.

    Raises UserError if the folder does not exist, has no image file or has several splits (train/, val/, ...) in it.
    """

    def __init__(self, path: Path, /, *, labels: bool = True):
        _require_one_split(path)
        self.path = path
        self._files = sorted(_find_images(os.fsencode(path)))
        if not self._files:
            known = " ".join(sorted(SUFFIXES))
            raise UserError(f"{path} holds no image files (looked in all its subfolders for {known})")
        self.ids = [escape(file) for file in self._files]
        labelled = labels and all(b"/" in file for file in self._files)
        class_of = [escape(file.partition(b"/")[0]) for file in self._files] if labelled else []
        self.classes = tuple(sorted(set(class_of)))
        number = {name: y for y, name in enumerate(self.classes)}
        self.label = np.array([number[name] for name in class_of] or [-1] * len(self.ids), np.int64)

    def load(self, i: int) -> tuple[np.ndarray, int]:
        data = self._read_file(i)
        return decode(data), content_hash(data)

    def changed_rows(self, content: np.ndarray, since: float) -> list[int]:
        return [i for i in np.flatnonzero(content).tolist() if self._has_changed(i, int(content[i]), since)]

    def _has_changed(self, i: int, content: int, since: float) -> bool:
        """Whether file i was touched at or after `since` (seconds of the epoch) and now has another hash."""
        try:
            # st_ctime, not st_mtime: a file that is moved here keeps its old modification time
            touched = os.stat(self._path_of(i)).st_ctime >= since
            return touched and content_hash(self._read_file(i)) != content
        except (OSError, BadImage):
            return True

    def _path_of(self, i: int) -> bytes:
        return os.path.join(os.fsencode(self.path), self._files[i])

    def _read_file(self, i: int) -> bytes:
        """The bytes of file i. Raises BadImage if it cannot be read, is no regular file or is too large."""
        try:
            with open(self._path_of(i), "rb", opener=_open_nonblocking) as file:
                info = os.fstat(file.fileno())
                if not stat.S_ISREG(info.st_mode):
                    raise BadImage(UNREADABLE, "no regular file")
                if info.st_size > MAX_BYTES:
                    raise BadImage(TOO_LARGE, f"{info.st_size} bytes, the limit is {MAX_BYTES}")
                return file.read()
        except OSError as problem:
            raise BadImage(UNREADABLE, problem.strerror or str(problem)) from None


def _require_one_split(path: Path) -> None:
    """Raises UserError if `path` is no folder or contains two or more split folders."""
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise UserError(f"data folder {path} {what}; give a folder of image files")
    splits = [name for name in _SPLITS if (path / name).is_dir()]
    if len(splits) > 1:
        found = " and ".join(f"{name}/" for name in splits)
        choices = " or ".join(f"folder:{path / name}" for name in splits)
        raise UserError(f"{path} holds {found}; name one of them: {choices}")


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # otherwise opening a named pipe without a writer never returns


def _find_images(root: bytes) -> list[bytes]:
    """Paths of the image files relative to `root`, as bytes: file names need not be UTF-8.

    Hidden files and folders are skipped. Raises UserError for a subfolder that cannot be listed; without this error
    a part of a data set would be taken for the whole.
    """
    found = []
    for folder, subfolders, names in os.walk(root, onerror=_raise_unlistable, followlinks=True):
        real_folder = os.path.realpath(folder) + b"/"
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(b".")
            and name != b"lost+found"
            # a symbolic link to a parent folder would be followed for ever
            and not real_folder.startswith(os.path.realpath(os.path.join(folder, name)) + b"/")
        ]
        base = os.path.relpath(folder, root)
        for name in names:
            suffix = os.path.splitext(name)[1].lower().decode("ascii", "replace")
            if suffix in SUFFIXES and not name.startswith(b"."):
                found.append(name if base == b"." else base + b"/" + name)
    return found


def _raise_unlistable(problem: OSError) -> None:
    folder = os.fsdecode(problem.filename)
    raise UserError(f"{folder} cannot be listed ({problem.strerror}); change its rights, or move it")


def escape(name: bytes) -> str:
    """Encode a file name as UTF-8 text, without loss.

    Bytes that are not UTF-8 become `%XX`; a % sign that could be read as such an escape becomes `%25`.
    """
    text = _RESEMBLES_ESCAPE.sub(b"%25", name).decode("utf-8", "surrogateescape")
    return "".join(f"%{ord(c) - 0xDC00:02X}" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in text)
