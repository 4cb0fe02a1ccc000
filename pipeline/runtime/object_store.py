"""Storage in an object store: s3://, gs://, az://, memory://. The usual environment variables say how.

A PUT is whole or not at all, so nothing is written beside and renamed. Errors that pass are tried
again with growing pauses, for minutes: an outage must not end a week's export. What does not pass
becomes one sentence, and `greet` says it within seconds, before any work begins.
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import obstore
from obstore import exceptions
from obstore.store import MemoryStore, from_url

from compress_ssl.pipeline.runtime.errors import UserError

T = TypeVar("T")
BACKOFF = {"init_backoff": timedelta(milliseconds=200), "max_backoff": timedelta(seconds=15), "base": 2.0}
RETRY_FOR_MINUTES = {"max_retries": 100, "retry_timeout": timedelta(minutes=5), "backoff": BACKOFF}
RETRY_FOR_SECONDS = {"max_retries": 3, "retry_timeout": timedelta(seconds=15), "backoff": BACKOFF}
PAUSES = (0.2, 1.0, 5.0, 15.0)  # seconds: before asking again after an answer that broke off
BROKEN_ANSWER = "body error"  # how the library calls such an answer, which it tries again only for GET
ERRORS = (exceptions.BaseError, FileNotFoundError, FileExistsError)


class Unsupported(Exception):
    """The server does not know what was asked of it."""


class Bucket:
    """A prefix in an object store as Storage. Raises UserError for wrong credentials or a missing bucket."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.objects = connect(self.url, RETRY_FOR_MINUTES, "300s")

    def __str__(self) -> str:
        return self.url

    def check_access(self) -> None:
        """Ask once, with little patience. Raises UserError if bucket, credentials or address are wrong."""
        objects = connect(self.url, RETRY_FOR_SECONDS, "20s")
        with self.translated_errors():
            next(obstore.list(objects, chunk_size=1), None)

    def get(self, key: str) -> bytes:
        return bytes(self._request(lambda: obstore.get(self.objects, key).bytes()))

    def put(self, key: str, data: bytes) -> None:
        self._request(lambda: obstore.put(self.objects, key, data))

    def put_new(self, key: str, data: bytes) -> bool:
        if self.exists(key):  # not every server knows the condition: some ignore it, some refuse it
            return False
        try:
            self._request(lambda: obstore.put(self.objects, key, data, mode="create", use_multipart=False))
        except FileExistsError:
            pass  # perhaps our own: a request is repeated when its answer is lost
        except Unsupported:
            self.put(key, data)
        return self.get(key) == data

    def delete(self, key: str) -> None:
        try:
            self._request(lambda: obstore.delete(self.objects, key))
        except FileNotFoundError:
            return

    def exists(self, key: str) -> bool:
        try:
            self._request(lambda: obstore.head(self.objects, key))
        except FileNotFoundError:
            return False
        return True

    def modified(self, key: str) -> float:
        return self._request(lambda: obstore.head(self.objects, key))["last_modified"].timestamp()

    def list(self, prefix: str = "") -> Iterator[str]:
        return (entry["path"] for entry in self._entries(prefix))

    def size(self) -> int:
        return sum(entry["size"] for entry in self._entries(""))

    def _entries(self, prefix: str) -> Iterator[Any]:
        """Name and size of what lies below a prefix; a listing that breaks off goes on after its last entry."""
        last: str | None = None
        pages: Any = None

        def page() -> Any:
            nonlocal pages
            pages = pages or obstore.list(self.objects, f"{prefix}/" if prefix else None, offset=last, chunk_size=1000)
            try:
                return next(pages, None)
            except ERRORS:
                pages = None
                raise

        while (entries := self._request(page)) is not None:
            yield from entries
            last = entries[-1]["path"] if entries else last

    def _request(self, request: Callable[[], T]) -> T:
        """One request, its failure in the words of `Storage` or as a UserError."""
        with self.translated_errors():
            for pause in PAUSES:
                try:
                    return request()
                except exceptions.GenericError as problem:
                    if BROKEN_ANSWER not in str(problem):
                        raise
                time.sleep(pause)
            return request()

    @contextmanager
    def translated_errors(self) -> Iterator[None]:
        """What goes wrong in the block, as FileNotFoundError, FileExistsError, Unsupported or UserError."""
        try:
            yield
        except ERRORS as problem:
            raise self._translate(problem) from None

    def _translate(self, problem: BaseException) -> Exception:
        text = str(problem)
        if "NoSuchBucket" in text or "ContainerNotFound" in text:
            return UserError(f"{self.url}: there is no such bucket; create it or correct the name")
        if isinstance(problem, exceptions.AlreadyExistsError | FileExistsError):
            return FileExistsError(text)
        if isinstance(problem, exceptions.NotFoundError | FileNotFoundError):
            return FileNotFoundError(text)
        if isinstance(problem, exceptions.NotSupportedError) or "501 Not Implemented" in text:
            return Unsupported(f"{self.url}: {_server_message(text)}")
        if "/latest/api/token" in text:  # where a machine of the provider asks for its own
            return UserError(
                f"no credentials were found for {self.url}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
                "(or AWS_SKIP_SIGNATURE=true for a public bucket)"
            )
        refused = isinstance(problem, exceptions.UnauthenticatedError | exceptions.PermissionDeniedError)
        if refused or "401 Unauthorized" in text or "403 Forbidden" in text:
            return UserError(
                f"{self.url} refuses these credentials ({_server_message(text)}); check the key, the secret and the "
                "rights (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, or those of your provider)"
            )
        return UserError(
            f"{self.url} does not answer as it should: {_server_message(text)}; check the address "
            "(AWS_ENDPOINT_URL, AWS_REGION) and the network; what is stored stays valid, repeat the command to continue"
        )


def connect(url: str, retry: dict[str, Any], timeout: str) -> Any:
    """The library's store for a URL; settings come from the environment. Raises UserError."""
    if url.startswith("memory://"):
        return _memory(url)
    endpoints = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    plain = {"allow_http": True} if any(os.environ.get(e, "").startswith("http://") for e in endpoints) else {}
    client = {"timeout": timeout, "connect_timeout": "10s", **plain}
    try:
        return from_url(url, retry_config=retry, client_options=client)  # type: ignore[call-overload]
    except (exceptions.BaseError, ValueError, TypeError) as problem:
        raise UserError(f"{url} cannot be opened: {_server_message(str(problem))}") from None


@cache
def _memory(url: str) -> Any:
    """One store per memory:// URL and process."""
    return MemoryStore()


def _server_message(text: str) -> str:
    """The server's own words if it sent any, else the beginning of the library's."""
    said = re.search(r"<Message>(.*?)</Message>", text, re.DOTALL)
    return " ".join((said[1] if said else text.partition("Debug source")[0]).split())[:200]
