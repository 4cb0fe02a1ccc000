"""Storage in an object store (s3://, gs://, az://, memory://), through the library obstore.

Credentials and endpoints come from the provider's usual environment variables. A PUT is atomic, so nothing needs to
be written to a part file and renamed. Temporary errors are retried with growing pauses for up to five minutes,
because a short outage must not end an export that takes a week. A permanent error becomes a UserError of one
sentence; `Bucket.check_access` finds it within seconds, before any work begins.
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, TypeVar

import obstore
from obstore import exceptions
from obstore.store import MemoryStore, from_url

from compress_ssl.pipeline.runtime.errors import UserError

if TYPE_CHECKING:
    from obstore import ListStream, ObjectMeta
    from obstore.store import BackoffConfig, ClientConfig, ObjectStore, RetryConfig

T = TypeVar("T")
# The pause before a retry doubles from 0.2 s to at most 15 s.
BACKOFF: "BackoffConfig" = {
    "init_backoff": timedelta(milliseconds=200),
    "max_backoff": timedelta(seconds=15),
    "base": 2.0,
}
# RETRY_FOR_MINUTES is for the work itself, RETRY_FOR_SECONDS for the check before it.
RETRY_FOR_MINUTES: "RetryConfig" = {"max_retries": 100, "retry_timeout": timedelta(minutes=5), "backoff": BACKOFF}
RETRY_FOR_SECONDS: "RetryConfig" = {"max_retries": 3, "retry_timeout": timedelta(seconds=15), "backoff": BACKOFF}
PAUSES = (0.2, 1.0, 5.0, 15.0)  # seconds before each retry of a request whose response was cut off
CUT_RESPONSE = "body error"  # part of obstore's message for such a response; obstore itself retries only GET
ERRORS = (exceptions.BaseError, FileNotFoundError, FileExistsError)  # all that obstore raises for a failed request


class Unsupported(Exception):
    """The server does not implement the request."""


class Bucket:
    """Storage below a prefix of a bucket. Every method raises UserError for wrong credentials or a missing bucket."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.objects = connect(self.url, RETRY_FOR_MINUTES, "300s")

    def __str__(self) -> str:
        return self.url

    def check_access(self) -> None:
        """List once, with a timeout of 20 s. Raises UserError if the bucket, credentials or address are wrong."""
        objects = connect(self.url, RETRY_FOR_SECONDS, "20s")
        with self.translated_errors():
            next(obstore.list(objects, chunk_size=1), None)

    def get(self, key: str) -> bytes:
        return bytes(self._request(lambda: obstore.get(self.objects, key).bytes()))

    def put(self, key: str, data: bytes) -> None:
        self._request(lambda: obstore.put(self.objects, key, data))

    def put_new(self, key: str, data: bytes) -> bool:
        if self.exists(key):  # some servers ignore the condition mode="create" below, others refuse it
            return False
        try:
            self._request(lambda: obstore.put(self.objects, key, data, mode="create", use_multipart=False))
        except FileExistsError:
            pass  # possibly our own object: obstore repeats a request whose response was lost
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

    def _entries(self, prefix: str) -> Iterator["ObjectMeta"]:
        """Name and size of each object below a prefix; a listing that fails continues after its last entry."""
        last: str | None = None
        pages: ListStream[Sequence[ObjectMeta]] | None = None

        def page() -> "Sequence[ObjectMeta] | None":
            nonlocal pages
            pages = pages or obstore.list(self.objects, f"{prefix}/" if prefix else None, offset=last, chunk_size=1000)
            try:
                return next(pages, None)
            except ERRORS:
                pages = None
                raise

        while True:
            entries = self._request(page)
            if entries is None:
                return
            yield from entries
            last = entries[-1]["path"] if entries else last

    def _request(self, request: Callable[[], T]) -> T:
        """The result of one request. Raises what `Storage` documents, or UserError."""
        with self.translated_errors():
            for pause in PAUSES:
                try:
                    return request()
                except exceptions.GenericError as problem:
                    if CUT_RESPONSE not in str(problem):
                        raise
                time.sleep(pause)
            return request()

    @contextmanager
    def translated_errors(self) -> Iterator[None]:
        """Raise obstore's errors in the block as FileNotFoundError, FileExistsError, Unsupported or UserError."""
        try:
            yield
        except ERRORS as problem:
            raise self._translate(problem) from None

    def _translate(self, problem: BaseException) -> Exception:
        """Our exception for one of obstore's. Some causes are known only by the text of the response."""
        text = str(problem)
        if "NoSuchBucket" in text or "ContainerNotFound" in text:
            return UserError(f"{self.url}: there is no such bucket; create it or correct the name")
        if isinstance(problem, exceptions.AlreadyExistsError | FileExistsError):
            return FileExistsError(text)
        if isinstance(problem, exceptions.NotFoundError | FileNotFoundError):
            return FileNotFoundError(text)
        if isinstance(problem, exceptions.NotSupportedError) or "501 Not Implemented" in text:
            return Unsupported(f"{self.url}: {_server_message(text)}")
        if "/latest/api/token" in text:  # obstore asks the metadata service only if no credentials are set
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
            f"a request to {self.url} failed: {_server_message(text)}; check the address "
            "(AWS_ENDPOINT_URL, AWS_REGION) and the network; what is stored stays valid, repeat the command to continue"
        )


def connect(url: str, retry: "RetryConfig", timeout: str) -> "ObjectStore":
    """The obstore store for a URL; its settings come from the environment.

    timeout: of one request, as obstore writes durations ("300s"). Raises UserError if the URL or a setting is
    invalid. Plain http is allowed only if the endpoint in the environment begins with it.
    """
    if url.startswith("memory://"):
        return _memory(url)
    endpoints = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    client: ClientConfig = {"timeout": timeout, "connect_timeout": "10s"}
    if any(os.environ.get(name, "").startswith("http://") for name in endpoints):
        client["allow_http"] = True
    try:
        return from_url(url, retry_config=retry, client_options=client)
    except (exceptions.BaseError, ValueError, TypeError) as problem:
        raise UserError(f"{url} cannot be opened: {_server_message(str(problem))}") from None


@cache
def _memory(url: str) -> "ObjectStore":
    """One store per memory:// URL and process, so that two Buckets of a URL share their objects."""
    return MemoryStore()


def _server_message(text: str) -> str:
    """The message in the server's response, or else the beginning of obstore's; at most 200 characters."""
    found = re.search(r"<Message>(.*?)</Message>", text, re.DOTALL)
    message = found[1] if found else text.partition("Debug source")[0]
    return " ".join(message.split())[:200]
