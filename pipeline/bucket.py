"""Storage in an object store: s3://, gs://, az://, memory://. The usual environment variables say how.

A PUT is whole or not at all, so nothing is written beside and renamed. Errors that pass are retried
with growing pauses by the library; what does not pass becomes one sentence.
"""

import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import obstore
from obstore import exceptions
from obstore.store import MemoryStore, from_url

from pipeline.errors import UserError
from pipeline.storage import Folder, Storage

T = TypeVar("T")
RETRY = {
    "max_retries": 8,
    "retry_timeout": timedelta(minutes=3),
    "backoff": {"init_backoff": timedelta(milliseconds=200), "max_backoff": timedelta(seconds=15), "base": 2.0},
}
CLIENT = {"timeout": "120s", "connect_timeout": "10s"}


class Bucket:
    """A prefix in an object store as Storage. Raises UserError for wrong credentials or a missing bucket."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.objects = connect(self.url)

    def __str__(self) -> str:
        return self.url

    def get(self, key: str) -> bytes:
        return bytes(self._ask(lambda: obstore.get(self.objects, key).bytes()))

    def put(self, key: str, data: bytes) -> None:
        self._ask(lambda: obstore.put(self.objects, key, data))

    def put_new(self, key: str, data: bytes) -> bool:
        try:
            self._ask(lambda: obstore.put(self.objects, key, data, mode="create", use_multipart=False))
        except FileExistsError:
            return False
        return True

    def delete(self, key: str) -> None:
        try:
            self._ask(lambda: obstore.delete(self.objects, key))
        except FileNotFoundError:
            return

    def exists(self, key: str) -> bool:
        try:
            self._ask(lambda: obstore.head(self.objects, key))
        except FileNotFoundError:
            return False
        return True

    def modified(self, key: str) -> float:
        return self._ask(lambda: obstore.head(self.objects, key))["last_modified"].timestamp()

    def list(self, prefix: str = "") -> Iterator[str]:
        pages = obstore.list(self.objects, f"{prefix}/" if prefix else None, chunk_size=1000)
        while (page := self._ask(lambda: next(pages, None))) is not None:
            yield from (entry["path"] for entry in page)

    def _ask(self, request: Callable[[], T]) -> T:
        """One request, its failure in the words of `Storage` or as a UserError."""
        try:
            return request()
        except exceptions.AlreadyExistsError as there:
            raise FileExistsError(str(there)) from None
        except (exceptions.UnauthenticatedError, exceptions.PermissionDeniedError) as refused:
            raise UserError(
                f"{self.url} refuses these credentials ({_gist(refused)}); check the key, the secret and the rights "
                "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, or those of your provider)"
            ) from None
        except (exceptions.BaseError, FileNotFoundError) as problem:
            if "NoSuchBucket" in str(problem) or "ContainerNotFound" in str(problem):
                raise UserError(f"{self.url}: there is no such bucket; create it or correct the name") from None
            if isinstance(problem, exceptions.NotFoundError | FileNotFoundError):
                raise FileNotFoundError(str(problem)) from None
            raise UserError(
                f"{self.url} does not answer as it should, also after {RETRY['max_retries']} tries: {_gist(problem)}; "
                "what is stored stays valid, repeat the command to continue"
            ) from None


def open_storage(where: str | os.PathLike[str]) -> Storage:
    """A folder, or a bucket for a URL: s3://, gs://, az://, memory://."""
    text = os.fspath(where)
    return Bucket(text) if "://" in text and not text.startswith("file://") else Folder(text.removeprefix("file://"))


def connect(url: str) -> Any:
    """The library's store for a URL; settings come from the environment. Raises UserError."""
    if url.startswith("memory://"):
        return _memory(url)
    endpoint = os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT") or ""
    plain = {"allow_http": True} if endpoint.startswith("http://") else {}
    try:
        return from_url(url, retry_config=RETRY, client_options={**CLIENT, **plain})  # type: ignore[call-overload]
    except (exceptions.BaseError, ValueError, TypeError) as problem:
        raise UserError(f"{url} cannot be opened: {_gist(problem)}") from None


@cache
def _memory(url: str) -> Any:
    """One store per memory:// URL and process."""
    return MemoryStore()


def _gist(problem: BaseException) -> str:
    return " ".join(str(problem).split())[:160]
