"""Finished results of protocols on disk: results/NAME-OPTIONS.npz, then results/NAME-OPTIONS.json.

OPTIONS is a fingerprint of the evaluator's dataclass fields, so their names, types and defaults are part of the
format on disk. The .json file is written last: a result without it is not finished and is computed again.
"""

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from compress_ssl.pipeline.runtime import digests
from compress_ssl.pipeline.runtime.storage import Folder


@dataclass(frozen=True, eq=False)
class Result:
    """What one protocol computed: numbers for metrics.json and arrays for the report."""

    metrics: dict[str, Any]  # goes into metrics.json under the protocol's name
    arrays: dict[str, np.ndarray]  # drawn by the report, saved as .npz


class Results:
    """All results of one evaluation folder, those of earlier commands included."""

    def __init__(self, folder: Folder):
        self.folder = folder

    def get(self, evaluator: Any) -> Result | None:
        """The finished result of an evaluator with exactly these options; None if there is none that can be read."""
        found = self._read(_file_name(evaluator))
        if found is None:
            return None
        saved, result = found
        return result if saved["options"] == json.loads(json.dumps(_options(evaluator))) else None

    def put(self, evaluator: Any, spec: str, result: Result) -> Result:
        """Write a result, the arrays first, and return it."""
        name = _file_name(evaluator)
        buffer = io.BytesIO()
        np.savez(buffer, **result.arrays)  # type: ignore[arg-type]
        # An earlier .json may be of other computed options (another head's digest): it must not mark these arrays done.
        self.folder.delete(f"results/{name}.json")
        self.folder.put(f"results/{name}.npz", buffer.getvalue())
        record = {"name": evaluator.name, "protocol": spec, "options": _options(evaluator), "metrics": result.metrics}
        self.folder.put(f"results/{name}.json", json.dumps(record, indent=1).encode())
        return result

    def gather(self, latest: Iterable[Any]) -> tuple[dict[str, Any], dict[str, Result]]:
        """(metrics by key of metrics.json, results by spec) of all finished results in the folder.

        The evaluators of `latest` come last: where several results have the same key, theirs replaces the others.
        Several knn protocols share the key "knn", side by side; an augmented linear probe has a key of its own.
        """
        latest_names = [_file_name(evaluator) for evaluator in latest]
        stems = sorted(key.removeprefix("results/").removesuffix(".json") for key in self.folder.list("results"))
        earlier = [name for name in stems if not name.endswith(".npz") and name not in latest_names]
        metrics: dict[str, Any] = {}
        results: dict[str, Result] = {}
        for name in earlier + latest_names:
            found = self._read(name)
            if found is None:
                continue
            saved, result = found
            key = saved["name"] + "_augmented" * bool(saved["options"].get("augment"))
            metrics[key] = {**metrics.get(key, {}), **result.metrics} if key == "knn" else result.metrics
            results.pop(saved["protocol"], None)  # so that the new one is the last in the order of the dictionary
            results[saved["protocol"]] = result
        return metrics, results

    def _read(self, name: str) -> tuple[dict[str, Any], Result] | None:
        """(record, result) of one file name; None if it is missing or damaged, so that it is computed again."""
        try:
            saved = json.loads(self.folder.get(f"results/{name}.json"))
            with np.load(io.BytesIO(self.folder.get(f"results/{name}.npz"))) as arrays:
                return saved, Result(saved["metrics"], dict(arrays))
        except (FileNotFoundError, ValueError, KeyError, OSError):
            return None


def _options(evaluator: Any) -> dict[str, Any]:
    """What decides a result: the dataclass fields by which two evaluators are compared."""
    return {field.name: getattr(evaluator, field.name) for field in fields(evaluator) if field.compare}


def _file_name(evaluator: Any) -> str:
    """The stem of a result's two files, from the protocol's name and the options that a user can give.

    Fields that the evaluator computes (init=False, such as the digest of a head's file) are left out of it: the
    result of a changed file replaces the earlier one, and `Results.get` tells them apart by the stored options.
    """
    computed = {field.name for field in fields(evaluator) if not field.init}
    given = {name: value for name, value in _options(evaluator).items() if name not in computed}
    return f"{evaluator.name}-{digests.fingerprint(given)[:12]}"
