"""Image files below a folder."""

import os
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np

from compress_ssl.pipeline.datasets.base import Dataset, content_hash
from compress_ssl.pipeline.datasets.decode import TOO_LARGE, UNREADABLE, BadImage, decode
from compress_ssl.pipeline.runtime.artifact import UserError

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm .jp2 .avif .ico .tga".split()
)
MAX_BYTES = 2**31  # of one file: far more than the largest image that is decoded needs
_LIKE_AN_ESCAPE = re.compile(rb"%(?=25|[89A-F][0-9A-F])")
_SPLITS = ("train", "training", "val", "valid", "validation", "test")


class Folder(Dataset):
    """Image files, sorted by path; class subfolders give labels.

    Labelled if every image lies in a subfolder of the root (its first folder is its class);
    a flat or mixed folder is unlabelled. `labels=false` ignores the subfolders.

    Raises UserError if there is no such folder, no image, or it holds splits side by side.
    """

    def __init__(self, path: Path, /, *, labels: bool = True):
        if not path.is_dir():
            what = "is not a folder" if path.exists() else "does not exist"
            raise UserError(f"data folder {path} {what}; give a folder of image files")
        self.path = path
        splits = [name for name in _SPLITS if (path / name).is_dir()]
        if len(splits) > 1:
            choices = " or ".join(f"folder:{path / name}" for name in splits)
            raise UserError(f"{path} holds {' and '.join(f'{name}/' for name in splits)}; name one of them: {choices}")
        self._files = sorted(_image_files(os.fsencode(path)))
        if not self._files:
            known = " ".join(sorted(SUFFIXES))
            raise UserError(f"{path} holds no image files (looked in all its subfolders for {known})")
        self.ids = [escape(file) for file in self._files]
        labelled = labels and all(b"/" in file for file in self._files)
        tops = [escape(file.partition(b"/")[0]) for file in self._files] if labelled else []
        self.classes = tuple(sorted(set(tops)))
        number = {name: y for y, name in enumerate(self.classes)}
        self.label = np.array([number[top] for top in tops] or [-1] * len(self.ids), np.int64)

    def load(self, i: int) -> tuple[np.ndarray, int]:
        data = self._bytes(i)
        return decode(data), content_hash(data)

    def changed_rows(self, content: np.ndarray, since: float) -> list[int]:
        return [i for i in np.flatnonzero(content).tolist() if self._changed(i, int(content[i]), since)]

    def _changed(self, i: int, content: int, since: float) -> bool:
        try:  # the time of the inode: a file moved here from elsewhere keeps its own
            touched = os.stat(self._place(i)).st_ctime >= since
            return touched and content_hash(self._bytes(i)) != content
        except (OSError, BadImage):
            return True

    def _place(self, i: int) -> bytes:
        return os.path.join(os.fsencode(self.path), self._files[i])

    def _bytes(self, i: int) -> bytes:
        try:
            with open(self._place(i), "rb", opener=_open) as file:
                about = os.fstat(file.fileno())
                if not stat.S_ISREG(about.st_mode):
                    raise BadImage(UNREADABLE, "no regular file")
                if about.st_size > MAX_BYTES:
                    raise BadImage(TOO_LARGE, f"{about.st_size} bytes, the limit is {MAX_BYTES}")
                return file.read()
        except OSError as problem:
            raise BadImage(UNREADABLE, problem.strerror or str(problem)) from None


def _open(path: Any, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe without a writer would wait for ever


def _image_files(root: bytes) -> list[bytes]:
    """Relative paths, as bytes: names need not be UTF-8. Hidden files and folders are passed over.

    Raises UserError for a subfolder that cannot be listed: half a data set would pass for a whole one.
    """
    found = []
    for folder, folders, names in os.walk(root, onerror=_unlisted, followlinks=True):
        inside = os.path.realpath(folder) + b"/"
        folders[:] = [
            name
            for name in folders
            if not name.startswith(b".")
            and name != b"lost+found"
            and not inside.startswith(os.path.realpath(os.path.join(folder, name)) + b"/")  # a link that leads back up
        ]
        base = os.path.relpath(folder, root)
        for name in names:
            if os.path.splitext(name)[1].lower().decode("ascii", "replace") in SUFFIXES and not name.startswith(b"."):
                found.append(name if base == b"." else base + b"/" + name)
    return found


def _unlisted(problem: OSError) -> None:
    folder = os.fsdecode(problem.filename)
    raise UserError(f"{folder} cannot be listed ({problem.strerror}); change its rights, or move it")


def escape(name: bytes) -> str:
    """UTF-8 text: bytes that are not UTF-8 are percent-escaped, and so are the % signs that would look like that."""
    text = _LIKE_AN_ESCAPE.sub(b"%25", name).decode("utf-8", "surrogateescape")
    return "".join(f"%{ord(c) - 0xDC00:02X}" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in text)
