"""Contract tests for what users add: each asserts what the rest of the program needs of a member of a family.

`check_dataset` opens a data set and loads some of its images, `check_model` runs a model on a few images,
`check_method` trains a method on artificial data and `check_protocol` scores artificial features. docs/plugins.md
shows how to use them in tests of your own.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress_ssl.pipeline.testing.dataset import check_dataset
    from compress_ssl.pipeline.testing.method import check_method
    from compress_ssl.pipeline.testing.model import check_model
    from compress_ssl.pipeline.testing.protocol import check_protocol

__all__ = ["check_dataset", "check_method", "check_model", "check_protocol"]

_MODULES = {"check_dataset": "dataset", "check_method": "method", "check_model": "model", "check_protocol": "protocol"}
"""{function: its module here}, imported when the function is first asked for: it needs torch."""


def __getattr__(name: str) -> Any:  # the type of a module's attribute that is imported late
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
