"""Finished results of protocols on disk: results/NAME-OPTIONS.npz, then results/NAME-OPTIONS.json.

OPTIONS is a fingerprint of the evaluator's dataclass fields, so their names, types and defaults are part of the
format on disk. The .json file is written last: a result without it is not finished and is computed again.
"""

import inspect
import io
import json
import math
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path, PurePath

import numpy as np

from compress_ssl.pipeline.evaluators import figure_arrays, find_protocol
from compress_ssl.pipeline.evaluators.base import Evaluator, Figure, Result, Score, Split
from compress_ssl.pipeline.evaluators.record import order_by_protocol, replace_key
from compress_ssl.pipeline.evaluators.requirements import is_ours
from compress_ssl.pipeline.evaluators.scores import sort_naturally
from compress_ssl.pipeline.runtime import digests
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.formatting import describe_exception
from compress_ssl.pipeline.runtime.progress import echo
from compress_ssl.pipeline.runtime.records import (
    UNSET,
    InvalidRecord,
    JsonObject,
    UnsetType,
    parse_json,
    read_record,
    to_json,
)
from compress_ssl.pipeline.runtime.storage import Folder


@dataclass(frozen=True)
class ResultRecord:
    """The .json file of a result. Version 1 wrote the first four entries."""

    name: str
    protocol: str  # the spec
    options: JsonObject
    metrics: JsonObject
    entry: str = ""  # of metrics.json
    side_by_side: bool = False
    code: str = ""  # digest of the file of a user's class
    scores: tuple[Score, ...] | UnsetType = UNSET
    figures: tuple[JsonObject, ...] = ()


@dataclass(frozen=True, eq=False)
class Kept:
    """A finished result and where it belongs."""

    spec: str
    entry: str
    side_by_side: bool
    result: Result


@dataclass(frozen=True, eq=False)
class Gathered:
    """All that an evaluation has to show."""

    protocols: JsonObject  # the entries of metrics.json by key
    scores: tuple[Score, ...]  # with keys and titles that are unique
    figures: tuple[Figure, ...]  # with names that are unique


class Results:
    """All results of one evaluation folder, those of earlier commands included.

    train, val: the splits that are scored; figures of version 1's results are made from them.
    """

    def __init__(self, folder: Folder, train: Split, val: Split):
        self.folder, self.train, self.val = folder, train, val

    def get(self, evaluator: Evaluator) -> Result | None:
        """The finished result of an evaluator with exactly these options; None if there is none that can be read.

        A user's own protocol whose file has changed since has no finished result.
        """
        found = self._read(_file_name(evaluator))
        if found is None:
            return None
        record, arrays = found
        if record.options != options_of(evaluator) or record.code != code_of(type(evaluator)):
            return None
        kept = self._restore(record, arrays)
        return kept.result if kept else None

    def put(self, evaluator: Evaluator, spec: str, result: Result) -> None:
        """Write a result, the arrays first."""
        name, options = _file_name(evaluator), options_of(evaluator)
        arrays = dict(result.arrays)
        figures = tuple(figure_arrays.pack(figure, arrays) for figure in result.figures)
        record = ResultRecord(
            evaluator.name, spec, options, result.metrics, evaluator.entry(options), evaluator.side_by_side,
            code_of(type(evaluator)), tuple(result.scores), figures,
        )  # fmt: skip
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        # An earlier .json may be of other computed options (another head's digest): it must not mark these arrays done.
        self.folder.delete(f"results/{name}.json")
        self.folder.put(f"results/{name}.npz", buffer.getvalue())
        self.folder.put(f"results/{name}.json", json.dumps(to_json(record), indent=1).encode())

    def gather(self, latest: Iterable[Evaluator]) -> Gathered:
        """The entries, scores and figures of all finished results in the folder.

        The evaluators of `latest` come last: where several results have the same entry, theirs replaces the others,
        unless their protocol puts them side by side.
        """
        shown: dict[str, list[Kept]] = {}  # by entry
        for kept in self._all(latest):
            beside = shown.get(kept.entry, []) if kept.side_by_side else []
            shown[kept.entry] = [*(other for other in beside if other.spec != kept.spec), kept]
        scores: list[Score] = []
        for entry, of_entry in shown.items():
            found = [replace_key(score, entry) for kept in of_entry for score in kept.result.scores]
            scores += sort_naturally(found) if len(of_entry) > 1 else found
        ordered = order_by_protocol(scores)
        entries = list(dict.fromkeys(score.key.partition(".")[0] for score in ordered))
        entries += [entry for entry in shown if entry not in entries]
        metrics = {
            entry: {key: value for kept in of_entry for key, value in kept.result.metrics.items()}
            for entry, of_entry in shown.items()
        }
        return Gathered(
            metrics,
            tuple(_with_unique_titles(ordered)),
            tuple(_with_unique_names(kept.result for entry in entries for kept in shown[entry])),
        )

    def _all(self, latest: Iterable[Evaluator]) -> Iterator[Kept]:
        """Every finished result, those of `latest` last."""
        names = [_file_name(evaluator) for evaluator in latest]
        stems = sorted(key.removeprefix("results/").removesuffix(".json") for key in self.folder.list("results"))
        earlier = [name for name in stems if not name.endswith(".npz") and name not in names]
        for name in earlier + names:
            found = self._read(name)
            kept = found and self._restore(*found)
            if kept:
                yield kept
            else:
                echo(
                    f"{self.folder}/results/{name}.json cannot be read and is left out; name its protocol to repeat it"
                )

    def _read(self, name: str) -> tuple[ResultRecord, dict[str, np.ndarray]] | None:
        """(record, arrays) of one file name; None if it is missing or damaged, so that it is computed again."""
        where = f"results/{name}.json"
        try:
            record = read_record(ResultRecord, parse_json(self.folder.get(where), where), where)
            return record, _load_arrays(self.folder.get(f"results/{name}.npz"), f"results/{name}.npz")
        except (InvalidRecord, OSError):
            return None

    def _restore(self, record: ResultRecord, arrays: dict[str, np.ndarray]) -> Kept | None:
        """The result of a record; None if it does not have what its figures or scores are made of."""
        of_version1 = isinstance(record.scores, UnsetType)
        try:
            return self._restore_version1(record, arrays) if of_version1 else _restore_listed(record, arrays)
        except (InvalidRecord, ValueError, KeyError, IndexError):
            return None

    def _restore_version1(self, record: ResultRecord, arrays: dict[str, np.ndarray]) -> Kept | None:
        """Scores and figures by the record's protocol, from the numbers and arrays that it kept."""
        protocol = find_protocol(record.name)
        if protocol is None:
            return None
        entry, metrics = protocol.entry(record.options), record.metrics
        scores = [
            replace(score, options=record.options) for score in protocol.scores_of(entry, metrics, record.protocol)
        ]
        figures = protocol.figures_of(metrics, arrays, self.train, self.val)
        return Kept(record.protocol, entry, protocol.side_by_side, Result(metrics, arrays, scores, figures))


def _load_arrays(raw: bytes, where: str) -> dict[str, np.ndarray]:
    """The arrays in a .npz file. Raises InvalidRecord for anything else."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:  # numpy would also read a single array, or a pickle
            names = archive.namelist()
        with np.load(io.BytesIO(raw)) as arrays:
            return {name.removesuffix(".npy"): arrays[name] for name in names}
    except Exception as problem:  # numpy, zipfile and zlib raise many types: MemoryError for a lie about a shape
        raise InvalidRecord(f"{where} is damaged: {describe_exception(problem)}") from None


def _restore_listed(record: ResultRecord, arrays: dict[str, np.ndarray]) -> Kept:
    """The scores and figures that the record lists."""
    assert not isinstance(record.scores, UnsetType)
    figures = [figure_arrays.unpack(figure, arrays) for figure in record.figures]
    own = {name: array for name, array in arrays.items() if not name.startswith(figure_arrays.PREFIX)}
    scores = [replace(score, options=record.options) for score in record.scores]
    result = Result(record.metrics, own, scores, figures)
    return Kept(record.protocol, record.entry or record.name, record.side_by_side, result)


# ---------------------------------------------------------------- gathering


def _with_unique_titles(scores: Iterable[Score]) -> Iterator[Score]:
    """The scores; one whose title another protocol has already is called "TITLE (its key)"."""
    taken: set[str] = set()
    for score in scores:
        renamed = replace(score, title=f"{score.title} ({score.key})", term=score.explained)
        shown = renamed if score.title in taken else score
        taken.add(shown.title)
        yield shown


def _with_unique_names(results: Iterable[Result]) -> Iterator[Figure]:
    """The figures; one whose name another result has already is called NAME-2, NAME-3 and so on."""
    taken: set[str] = set()
    for result in results:
        for figure in result.figures:
            name, number = figure.name, 1
            while name in taken:
                number += 1
                name = f"{figure.name}-{number}"
            taken.add(name)
            yield figure if name == figure.name else replace(figure, name=name)


# ---------------------------------------------------------------- what identifies a result


def options_of(evaluator: Evaluator) -> JsonObject:
    """What decides a result, as JSON: the dataclass fields by which two evaluators are compared.

    Raises UserError for an option that has no place in JSON.
    """
    if not is_dataclass(evaluator):
        raise UserError(f"protocol {evaluator.name!r}: {type(evaluator).__name__} must be a frozen dataclass")
    return {
        field.name: _as_json(getattr(evaluator, field.name), f"protocol {evaluator.name!r}: option {field.name}")
        for field in fields(evaluator)
        if field.compare
    }


def _as_json(value: object, what: str) -> object:
    """The value of an option as it will be read from JSON."""
    if isinstance(value, PurePath) or (isinstance(value, float) and not math.isfinite(value)):
        return str(value)  # JSON has no infinity
    try:
        read: object = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        raise UserError(
            f"{what} is a {type(value).__name__}, which cannot be kept with the result; options are numbers, "
            "words, paths, None, or lists of them (field(compare=False) for what does not decide the result)"
        ) from None
    return read


def code_of(cls: type[Evaluator]) -> str:
    """Digest of the file of a user's own class, so that a changed file is run again; "" for our protocols."""
    if is_ours(cls):
        return ""  # the results of our protocols are kept for ever
    file = inspect.getsourcefile(cls)
    return digests.digest(Path(file).read_bytes()) if file else ""


def _file_name(evaluator: Evaluator) -> str:
    """The stem of a result's two files, from the protocol's name and the options that a user can give.

    Fields that the evaluator computes (init=False, such as the digest of a head's file) are left out of it: the
    result of a changed file replaces the earlier one, and `Results.get` tells them apart by the stored options.
    """
    assert is_dataclass(evaluator)
    computed = {field.name for field in fields(evaluator) if not field.init}
    given = {name: value for name, value in options_of(evaluator).items() if name not in computed}
    return f"{evaluator.name}-{digests.fingerprint(given)[:12]}"
