"""What protocols found, on disk: results/NAME-OPTIONS.npz, then NAME-OPTIONS.json, which says it is done."""

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.storage import Folder


@dataclass(frozen=True, eq=False)
class Result:
    """What one protocol found."""

    metrics: dict[str, Any]  # goes into metrics.json under the protocol's name
    arrays: dict[str, np.ndarray]  # what the report draws; saved beside


class Results:
    """All results of an evaluation folder, those of earlier commands too."""

    def __init__(self, folder: Folder):
        self.folder = folder

    def get(self, evaluator: Any) -> Result | None:
        """An evaluator's result with just these options, if it is there and whole."""
        found = self._read(_name(evaluator))
        return found[1] if found and found[0]["options"] == json.loads(json.dumps(_options(evaluator))) else None

    def put(self, evaluator: Any, spec: str, result: Result) -> Result:
        """Write a result, arrays first."""
        name, buffer = _name(evaluator), io.BytesIO()
        np.savez(buffer, **result.arrays)  # type: ignore[arg-type]
        self.folder.delete(f"results/{name}.json")  # one of another digest must not vouch for these arrays
        self.folder.put(f"results/{name}.npz", buffer.getvalue())
        said = {"name": evaluator.name, "protocol": spec, "options": _options(evaluator), "metrics": result.metrics}
        self.folder.put(f"results/{name}.json", json.dumps(said, indent=1).encode())
        return result

    def gather(self, last: Iterable[Any]) -> tuple[dict[str, Any], dict[str, Result]]:
        """(metrics by key of metrics.json, results by spec) of all that is here; those of `last` win a key.

        Several knn protocols share one key; an augmented linear probe has a key of its own.
        """
        asked = [_name(evaluator) for evaluator in last]
        there = sorted(key.removeprefix("results/").removesuffix(".json") for key in self.folder.list("results"))
        names = [name for name in there if not name.endswith(".npz") and name not in asked] + asked
        metrics: dict[str, Any] = {}
        results: dict[str, Result] = {}
        for name in names:
            if (found := self._read(name)) is None:
                continue
            saved, result = found
            key = saved["name"] + "_augmented" * bool(saved["options"].get("augment"))
            metrics[key] = {**metrics.get(key, {}), **result.metrics} if key == "knn" else result.metrics
            results.pop(saved["protocol"], None)
            results[saved["protocol"]] = result
        return metrics, results

    def _read(self, name: str) -> tuple[dict[str, Any], Result] | None:
        try:
            saved = json.loads(self.folder.get(f"results/{name}.json"))
            with np.load(io.BytesIO(self.folder.get(f"results/{name}.npz"))) as arrays:
                return saved, Result(saved["metrics"], dict(arrays))
        except (FileNotFoundError, ValueError, KeyError, OSError):
            return None  # not there, or cut short: it is made again


def _options(evaluator: Any) -> dict[str, Any]:
    """What decides a result: the fields that two evaluators are compared by."""
    return {field.name: getattr(evaluator, field.name) for field in fields(evaluator) if field.compare}


def _name(evaluator: Any) -> str:
    """A file name that stands for a protocol with the options a user gave.

    What an evaluator found out for itself, as the digest of a file, is not in it: another one takes its place.
    """
    found = {field.name for field in fields(evaluator) if not field.init}
    given = {name: value for name, value in _options(evaluator).items() if name not in found}
    return f"{evaluator.name}-{artifact.fingerprint(given)[:12]}"
