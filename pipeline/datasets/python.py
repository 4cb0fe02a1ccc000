"""Images of a user's own: `python:MODULE:NAME,key=value`, `python:FILE.py:NAME`, or of a package."""

from collections.abc import Callable

from compress_ssl.pipeline.datasets.base import Dataset
from compress_ssl.pipeline.datasets.user_dataset import UserDataset, adapt
from compress_ssl.pipeline.runtime.user_object import UserObject


def dataset(user: UserObject) -> Callable[..., Dataset]:
    """Your own images: a class or function that returns a Dataset of ours or a map-style data set, as torch's are."""

    def build(*argument: object, **options: object) -> UserDataset:
        return adapt(user(*argument, **options), user.name, user.file)

    build.__signature__ = user.signature  # type: ignore[attr-defined]  # the keys of a spec are those of the object
    return build
