"""check_protocol: a test of the requirements that an evaluation has of every protocol, for your own protocols too."""

import html
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch

from compress_ssl.pipeline.evaluators import figure_arrays
from compress_ssl.pipeline.evaluators.base import (
    AugmentedFeatures,
    DataRecord,
    Evaluation,
    Evaluator,
    ModelRecord,
    Result,
    Split,
)
from compress_ssl.pipeline.evaluators.record import parse_metrics
from compress_ssl.pipeline.evaluators.requirements import find_class_faults, find_result_faults
from compress_ssl.pipeline.evaluators.results import Gathered, Results, options_of
from compress_ssl.pipeline.report import comparison
from compress_ssl.pipeline.report.evaluation import write_report
from compress_ssl.pipeline.report.html import printable
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.storage import Folder

TRAIN_IMAGES, VAL_IMAGES, WIDTH = 80, 40, 8
"""Images of the two artificial splits, and dimensions d of their features."""

CLASSES = ("a", "b", "c", "d", "e", "f")
"""Names of the classes: more than five, so that a top-5 is no matter of course."""

MODEL = ModelRecord("artificial", "model", 1000, WIDTH, spec="artificial")

# ---------------------------------------------------------------- the public check


def check_protocol(build: Callable[..., Evaluator], /, **options: object) -> None:
    """Run a protocol on small artificial splits and raise AssertionError if it breaks a requirement.

    The data are Gaussian classes "a" to "f": 80 training and 40 validation images with features of 8 dimensions. It
    takes about a second. The assertions, in their order, and what each protects:

    - The class is a dataclass derived from Evaluator, with a `name` that is free; every option is one of its fields
      and can be kept as JSON: by them a finished result is found again.
    - It returns a Result: finite numbers, scores within their ranges with keys and titles of their own, figures of
      the known kinds. It hands over a score at least.
    - It changes neither the splits nor the global random state, and gives the same Result again, bit for bit, under
      another global seed: a repeated command must say the same.
    - Where `needs_labels` does not name a split, images without a label (-1), some or all, are scored or refused with
      UserError. A protocol that `needs_augmented` refuses to run without augmented features.
    - The result is read back from disk as it was, bit for bit: a finished protocol is not run again.
    - Its scores are in metrics.json, and its scores and figures in the report and the comparison.

    build: the protocol's class, called as build(**options). options: its fields.

    Example, in a file of tests (the class Centroid is in docs/protocols.md):
        from compress_ssl.pipeline.testing import check_protocol
        from mine import Centroid

        def test_centroid_meets_the_requirements_of_a_protocol():
            check_protocol(Centroid, metric="l2")
    """
    evaluator = _build(build, options)
    name = type(evaluator).__name__
    train, val = _splits()
    with tempfile.TemporaryDirectory() as folder:
        result = _run(evaluator, train, val, Path(folder))
        assert result.scores, f"{name} hands over no score for labelled images; add a Score to its Result"
        _require_repeatable(_build(build, options), result, train, val, Path(folder))
        _require_labels_declared(evaluator, train, val, Path(folder))
        _require_augmented_declared(evaluator, train, val, Path(folder))
        gathered = _require_kept(evaluator, result, train, val, Path(folder) / "evaluation")
        _require_shown(name, result, gathered, train, val, Path(folder) / "evaluation")


# ---------------------------------------------------------------- the artificial data


def _splits() -> tuple[Split, Split]:
    """(training split, validation split): classes around random centres, so that any sensible score is above chance."""
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(len(CLASSES), WIDTH))
    parts = []
    for images, first_row in ((TRAIN_IMAGES, 100), (VAL_IMAGES, 500)):
        label = draw.permutation(np.arange(images) % len(CLASSES))
        features = (centres[label] + 0.7 * draw.normal(size=(images, WIDTH))).astype(np.float32)
        parts.append(Split(features, label.astype(np.int64), np.arange(images) + first_row, CLASSES))
    return parts[0], parts[1]


def _augmented(epoch: int) -> np.ndarray:
    """(n, d) features of the training images in another random view."""
    noise = np.random.default_rng(epoch + 1).normal(size=(TRAIN_IMAGES, WIDTH))
    return (_splits()[0].features + 0.1 * noise).astype(np.float32)


def _unlabelled(split: Split, every: int) -> Split:
    """The split without the labels of every so manieth image."""
    label = split.label.copy()
    label[::every] = -1
    return Split(split.features, label, split.rows, split.classes)


# ---------------------------------------------------------------- assertions


def _build(build: Callable[..., Evaluator], options: Mapping[str, object]) -> Evaluator:
    """The protocol, whose class and options are asserted to be what they must."""
    if isinstance(build, type):
        fault = next(find_class_faults(build), None)
        assert not fault, f"{build.__name__} {fault}"
    evaluator = build(**options)
    name = type(evaluator).__name__
    fault = next(find_class_faults(type(evaluator)), None)
    assert not fault, f"{name} {fault}"
    known = {field.name for field in fields(evaluator)}  # type: ignore[arg-type]  # a dataclass, as was asserted
    for option in options:
        assert option in known, f"{name} takes the option {option!r}, which is no field of the dataclass; make it one"
    try:
        recorded = options_of(evaluator)
    except UserError as wrong:
        raise AssertionError(f"{name}: {wrong}") from None
    assert recorded == options_of(build(**options)), f"{name} has other fields when it is built again; make them equal"
    entry = evaluator.entry(recorded)
    assert entry == evaluator.name or entry.startswith(f"{evaluator.name}_"), (
        f"{name}.entry returned {entry!r}; return {evaluator.name!r}, or that, an underscore and a variant"
    )
    return evaluator


def _run(evaluator: Evaluator, train: Split, val: Split, folder: Path) -> Result:
    """The result on these splits, asserted to be valid and to have left its inputs unchanged."""
    name = type(evaluator).__name__
    augmented: AugmentedFeatures | None = _augmented if evaluator.needs_augmented else None
    before = [array.copy() for split in (train, val) for array in (split.features, split.label, split.rows)]
    result = evaluator(train, val, folder, augmented)
    fault = next(find_result_faults(result, train, val), None)
    assert not fault, f"{name} {fault}"
    after = [array for split in (train, val) for array in (split.features, split.label, split.rows)]
    unchanged = all(np.array_equal(old, new) for old, new in zip(before, after, strict=True))
    assert unchanged, f"{name} has changed the features, labels or rows of a split; work on a copy"
    return result


def _require_repeatable(evaluator: Evaluator, result: Result, train: Split, val: Split, folder: Path) -> None:
    """Assert that a protocol of the same options, built anew, gives the same result under another global seed."""
    name = type(evaluator).__name__
    with _other_global_seed():
        state = _global_random_state()
        again = _run(evaluator, train, val, folder)  # not the first run, in which libraries are imported that may draw
        assert _global_random_state() == state, (
            f"{name} has drawn from a global random generator; draw from one of its own, numpy.random.default_rng(seed)"
        )
    assert _contents(again) == _contents(result), (
        f"{name} has another result when it is run again; draw from a generator of its own with a "
        "fixed seed, and keep nothing between runs"
    )


def _require_labels_declared(evaluator: Evaluator, train: Split, val: Split, folder: Path) -> None:
    """Assert that splits outside `needs_labels` may lack labels: they are scored, or refused with UserError."""
    name, needs = type(evaluator).__name__, evaluator.needs_labels
    for every, which in ((3, "some"), (1, "all")):
        bare_train = train if "training" in needs else _unlabelled(train, every)
        bare_val = val if "validation" in needs else _unlabelled(val, every)
        if bare_train is train and bare_val is val:
            continue
        try:
            _run(evaluator, bare_train, bare_val, folder)
        except UserError:
            continue
        except AssertionError:
            raise
        except Exception as wrong:
            raise AssertionError(
                f"{name} fails where {which} images have no label ({type(wrong).__name__}: {wrong}); leave out labels "
                f"of -1, raise UserError, or name the split in needs_labels, which is {needs!r}"
            ) from wrong


def _require_augmented_declared(evaluator: Evaluator, train: Split, val: Split, folder: Path) -> None:
    """Assert that a protocol which needs augmented features says so in words where there are none."""
    if not evaluator.needs_augmented:
        return
    failure: Exception | None = None
    try:
        evaluator(train, val, folder, None)
    except UserError:
        return
    except Exception as wrong:
        failure = wrong
    does = f"fails with {type(failure).__name__}" if failure else "runs"
    raise AssertionError(
        f"{type(evaluator).__name__} needs augmented features and {does} where `augmented` is None; raise UserError "
        "there, or return False from needs_augmented"
    ) from failure


def _require_kept(evaluator: Evaluator, result: Result, train: Split, val: Split, folder: Path) -> Gathered:
    """Assert that the result comes back from disk bit for bit, and return what an evaluation shows of it."""
    results = Results(Folder(folder), train, val)
    results.put(evaluator, evaluator.name, result)
    kept = Results(Folder(folder), train, val).get(evaluator)
    assert kept is not None and _contents(kept) == _contents(result), (
        f"the result of {type(evaluator).__name__} is not the same when it is read back from disk; use arrays of "
        "numbers and words, and metrics of numbers, words, lists and dictionaries"
    )
    return results.gather([evaluator])


def _require_shown(name: str, result: Result, gathered: Gathered, train: Split, val: Split, folder: Path) -> None:
    """Assert that metrics.json, the report and the comparison show the result."""
    data = DataRecord("artificial", len(train), "artificial", len(val), len(CLASSES))
    evaluation = Evaluation(MODEL, data, gathered.scores, gathered.protocols)
    read = parse_metrics(json.loads(json.dumps(evaluation.to_json(), allow_nan=False)), "metrics.json")
    assert read == evaluation, f"metrics.json does not keep the scores of {name}; use words and finite numbers"
    page = write_report(
        folder,
        evaluation,
        gathered.figures,
        splits={"train": train, "val": val},
        load_image=lambda split, row: _picture(row),
    ).read_text()
    _, compared = comparison.compare([evaluation])
    for score in result.scores:
        title = str(printable(score.title))
        for shown, text in (("report", page), ("comparison", compared)):
            assert title in html.unescape(text), f"the {shown} does not show {score.title} of {name}"
    for figure in gathered.figures:
        assert (folder / f"figures/{figure.name}.png").exists(), f"the report does not show {figure.name} of {name}"


def _picture(row: int) -> np.ndarray:
    return np.full((8, 8, 3), row % 256, np.uint8)


# ---------------------------------------------------------------- comparing


def _contents(result: Result) -> dict[str, object]:
    """All of a result in a form that == compares bit for bit."""
    arrays = dict(result.arrays)
    figures = [figure_arrays.pack(figure, arrays) for figure in result.figures]
    scores = [replace(score, options={}) for score in result.scores]  # options are filled in when a result is kept
    bits = {name: (array.dtype.str, array.shape, array.tobytes()) for name, array in arrays.items()}
    return {"metrics": json.dumps(result.metrics), "scores": scores, "figures": figures, "arrays": bits}


def _global_random_state() -> tuple[object, ...]:
    """The states of the global generators of Python, NumPy and torch, each in a form of its own."""
    _, key, position, *normal = np.random.get_state()
    return random.getstate(), np.asarray(key).tobytes(), position, normal, torch.get_rng_state().tolist()


@contextmanager
def _other_global_seed() -> Iterator[None]:
    """The global generators with another seed, and as they were afterwards."""
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(12345)
    np.random.seed(12345)
    torch.manual_seed(12345)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)
