"""check_protocol: every protocol of ours passes it, and each kind of mistake is found and named in the error."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from compress_ssl import check_protocol
from compress_ssl.pipeline.evaluators import PROTOCOLS
from compress_ssl.pipeline.evaluators.base import (
    AugmentedFeatures,
    Bars,
    ConfusionMatrix,
    Evaluator,
    Figure,
    ImageGrid,
    ImageRow,
    Lines,
    Panel,
    Result,
    Score,
    Split,
    Tile,
)
from compress_ssl.pipeline.models.linear_head import LinearHead, save
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.testing.protocol import CLASSES, WIDTH

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "nn": [{}],
    "knn": [{"k": 5}, {"k": 20, "temperature": 0.5}],
    "cluster": [{}, {"clusters": 9}],
    "linear": [{"epochs": 3}, {"epochs": 3, "augment": True}],
}


@pytest.mark.parametrize(
    ("name", "options"), [pytest.param(n, o, id=f"{n}-{o}") for n, many in OPTIONS.items() for o in many]
)
def test_every_protocol_of_ours_passes(name: str, options: dict[str, Any]) -> None:
    check_protocol(PROTOCOLS.resolve(name), **options)


@pytest.mark.parametrize("names", [CLASSES, None])
def test_the_classifier_passes_with_a_head_for_the_artificial_classes(
    names: tuple[str, ...] | None, tmp_path: Path
) -> None:
    save(LinearHead(torch.randn(len(CLASSES), WIDTH), torch.zeros(len(CLASSES)), names), tmp_path / "head", {})
    check_protocol(PROTOCOLS.resolve("classifier"), head=tmp_path / "head")


def test_no_protocol_of_ours_is_left_out() -> None:
    assert {*OPTIONS, "classifier", "python"} == set(PROTOCOLS.entries)


# ---------------------------------------------------------------- mistakes


@dataclass(frozen=True)
class Correct(Evaluator):
    """The share of images of the commonest class: a smallest protocol that passes."""

    name: ClassVar[str] = "common"

    def __call__(self, train: Split, val: Split, folder: Path, augmented: AugmentedFeatures | None = None) -> Result:
        commonest = np.bincount(train.label).argmax()
        return self.result(100 * float((val.label == commonest).mean()), train, val)

    def result(self, top1: float, train: Split, val: Split) -> Result:
        return Result({"top1": top1}, {"label": val.label}, self.scores(top1), self.figures())

    def scores(self, top1: float) -> list[Score]:
        return [Score("top1", "Commonest", top1, "top-1 of always predicting the commonest class")]

    def figures(self) -> list[Figure]:
        return []


def test_the_smallest_protocol_passes() -> None:
    check_protocol(Correct)


def variant(**members: Any) -> type[Evaluator]:
    """The smallest protocol with other members."""
    return type("Variant", (Correct,), members)


def scores(*chosen: Score) -> type[Evaluator]:
    return variant(scores=lambda self, top1: list(chosen))


def figures(*chosen: Figure) -> type[Evaluator]:
    return variant(figures=lambda self: list(chosen))


def result(make: Callable[[list[Score]], object]) -> type[Evaluator]:
    return variant(result=lambda self, top1, train, val: make(self.scores(top1)))


def drawing(draw: Callable[[], float]) -> type[Evaluator]:
    return variant(result=lambda self, top1, train, val: Correct.result(self, 100 * draw(), train, val))


CURVE = Lines(name="f", title="F", panels=(Panel(title="p", x=np.arange(2), lines={"a": np.arange(2)}),))
ELSEWHERE = ImageRow(title="r", tiles=(Tile(split="val", index=10_000, caption=""),))


class ChangesTheFeatures(Correct):
    def result(self, top1: float, train: Split, val: Split) -> Result:
        train.features[0] *= 2
        return super().result(top1, train, val)


@dataclass(frozen=True)
class TakesAugmentedForGranted(Correct):
    @property
    def needs_augmented(self) -> bool:
        return True

    def __call__(self, train: Split, val: Split, folder: Path, augmented: AugmentedFeatures | None = None) -> Result:
        assert augmented is not None
        return self.result(float(len(augmented(0))), train, val)


class UsesNoAugmented(TakesAugmentedForGranted):
    def __call__(self, train: Split, val: Split, folder: Path, augmented: AugmentedFeatures | None = None) -> Result:
        return self.result(5.0, train, val)


class RefusesWithoutAugmented(TakesAugmentedForGranted):
    def __call__(self, train: Split, val: Split, folder: Path, augmented: AugmentedFeatures | None = None) -> Result:
        if augmented is None:
            raise UserError("only stored features are at hand")
        return self.result(5.0, train, val)


@dataclass(frozen=True)
class OptionThatIsNoJson(Correct):
    where: object = field(default_factory=object)


@dataclass(frozen=True)
class OtherFieldsEachTime(Correct):
    number: float = field(default_factory=random.random)


class Unfinished(Evaluator):
    name = "unfinished"


class NoDataclass(Evaluator):
    name = "plain"

    def __call__(self, train: Split, val: Split, folder: Path, augmented: AugmentedFeatures | None = None) -> Result:
        return Result({})


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        (dict, "dict is no subclass of .*Evaluator; derive it from that class"),
        (Unfinished, r"Unfinished has no __call__\(train, val, folder, augmented\); write one"),
        (NoDataclass, r"NoDataclass is no dataclass; write @dataclass\(frozen=True\)"),
        (variant(name="my name"), "Variant has the name 'my name'; give it a class variable `name` of letters"),
        (variant(name="nn"), "Variant has the name 'nn', which is that of a protocol of compress"),
        (variant(entry=lambda *_: "other"),
         "Variant.entry returned 'other'; return 'common', or that, an underscore"),
        (OptionThatIsNoJson, "option where is a object, which cannot be kept with the result"),
        (OtherFieldsEachTime, "OtherFieldsEachTime has other fields when it is built again"),
        (result(lambda scores: {}), r"returned a dict; return a Result\("),
        (scores(), "Variant hands over no score for labelled images; add a Score"),
        (scores(Score("a", "A", 1.0), Score("a", "B", 1.0)), "two scores of the key 'a'; give each one of its own"),
        (scores(Score("a", "A", 1.0), Score("b", "A", 1.0)), "two scores of the title 'A'; give each one of its own"),
        (figures(CURVE, CURVE), "two figures of the name 'f'; give each one of its own"),
        (figures(ImageGrid(name="f", title="F", rows=(ELSEWHERE,))),
         "shows image 10000 of 'val' in the figure 'f'; the splits are"),
        (figures(Figure(name="f", title="F")),
         "has a Figure among its figures; the kinds are Lines, ConfusionMatrix, ImageGrid, Bars"),
        (result(lambda scores: Result({"top1": float("inf")}, {}, scores)),
         "has metrics that are no JSON .*use numbers that are finite"),
        (result(lambda scores: Result({"top1": (5.0,)}, {}, scores)),
         "has metrics that JSON would change; use a dictionary whose keys are words, and lists"),
        (result(lambda scores: Result({}, {"mine": np.array([{}])}, scores)),
         "has the array 'mine', which is no NumPy array of numbers or words"),
        (ChangesTheFeatures, "has changed the features, labels or rows of a split; work on a copy"),
        (drawing(np.random.random), "has drawn from a global random generator; draw from one of its own"),
        (drawing(random.random), "has drawn from a global random generator; draw from one of its own"),
        (drawing(lambda: torch.rand(()).item()), "has drawn from a global random generator; draw from one of its own"),
        (drawing(lambda: np.random.default_rng().random()),
         "has another result when it is run again; draw from a generator of its own with a fixed"),
        (variant(needs_labels=()),
         r"fails where some images have no label \(ValueError: .*needs_labels, which is \(\)"),
        (TakesAugmentedForGranted, "needs augmented features and fails with AssertionError where `augmented` is None"),
        (UsesNoAugmented, "needs augmented features and runs where `augmented` is None; raise UserError there"),
    ],
)  # fmt: skip
def test_each_kind_of_mistake_is_found_and_named(protocol: Callable[..., Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_protocol(protocol)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: Lines(name="f", title="F", panels=(Panel(title="p", x=[1, 2], lines={"a": np.ones(2)}),)),
         "'f': x of a panel is of type list; give a numpy array"),
        (lambda: Lines(name="f", title="F", panels=(Panel(title="p", x=np.ones(2), lines={"a": [1.0, 2.0]}),)),
         "'f': line 'a' is of type list; give a numpy array"),
        (lambda: Bars(name="f", title="F", labels=("a",), values=[1.0]), "'f': values is of type list"),
        (lambda: Bars(name="f", title="F", labels=("a",), values=np.array(["1"])), "values is an array of <U1"),
        (lambda: Bars(name="f", title="F", labels=("a",), values=np.array([np.inf])), "values has values that are not"),
        (lambda: ConfusionMatrix(name="f", title="F", counts=np.ones(3), rows=("a",), columns=("a",)),
         r"'f': counts is an array of float64 with the shape \(3,\); give numbers in an array with 2 axes"),
    ],
)  # fmt: skip
def test_a_figure_whose_numbers_are_no_array_says_which_part_it_is(draw: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw()


def test_an_option_that_is_no_field_is_found() -> None:
    def build(*, power: float) -> Evaluator:
        return Correct()

    with pytest.raises(AssertionError, match="takes the option 'power', which is no field of the dataclass; make it"):
        check_protocol(build, power=1.0)


@pytest.mark.parametrize("protocol", [variant(needs_labels=("training",)), RefusesWithoutAugmented])
def test_what_is_declared_or_refused_in_words_passes(protocol: type[Evaluator]) -> None:
    check_protocol(protocol)


@pytest.mark.parametrize("part", ["scores", "metrics", "figures", "arrays"])
def test_a_result_that_comes_back_otherwise_is_found(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from compress_ssl.pipeline.evaluators.results import Results

    other: dict[str, Any] = {"scores": (), "metrics": {}, "figures": [CURVE], "arrays": {}}
    original = Results.get
    monkeypatch.setattr(Results, "get", lambda *given: replace(original(*given), **{part: other[part]}))
    with pytest.raises(AssertionError, match="the result of Correct is not the same when it is read back from disk"):
        check_protocol(Correct)


def test_a_score_that_a_page_leaves_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from compress_ssl.pipeline.report import comparison

    monkeypatch.setattr(comparison, "compare", lambda rows: ("", ""))
    with pytest.raises(AssertionError, match="the comparison does not show Commonest of Correct"):
        check_protocol(Correct)
