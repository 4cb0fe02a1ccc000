"""Runs protocols on two splits, keeps what they return, and puts together what an evaluation shows."""

import inspect
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from compress_ssl.pipeline.datasets.base import Dataset
from compress_ssl.pipeline.evaluators.base import AugmentedFeatures, Evaluator, Result, Split, require_labels
from compress_ssl.pipeline.evaluators.requirements import find_result_faults, is_ours
from compress_ssl.pipeline.evaluators.results import Gathered, Results, options_of
from compress_ssl.pipeline.runtime import digests
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.import_object import describe_with_location
from compress_ssl.pipeline.runtime.storage import Folder

CHECK = "compress_ssl.pipeline.testing.check_protocol tests a protocol in seconds"


def require_distinct(evaluators: Mapping[str, Evaluator]) -> None:
    """Raises UserError if two protocols of a command would write one entry of metrics.json, each hiding the other.

    evaluators: by spec.
    """
    taken: dict[str, tuple[str, Evaluator]] = {}
    for spec, evaluator in evaluators.items():
        entry = evaluator.entry(options_of(evaluator))
        other_spec, other = taken.setdefault(entry, (spec, evaluator))
        if type(other) is not type(evaluator):
            raise UserError(
                f"--protocol {other_spec} and --protocol {spec} both have the name {entry!r}, which is their entry in "
                "metrics.json; change the `name` of one of them"
            )
        if other != evaluator and not evaluator.side_by_side:
            raise UserError(
                f"--protocol {other_spec} and --protocol {spec} both write the entry {entry!r} of metrics.json, where "
                "one would hide the other; score them in two evaluations, with an --out for each"
            )


def require_fitting(
    evaluators: Mapping[str, Evaluator], model: str, weights: str, train: Dataset | Split, val: Dataset | Split
) -> None:
    """Raises UserError for a protocol that is for another model or lacks labels, before features are computed.

    model: the name of what is scored; weights: digest of its weights.
    """
    sets = {"training": train, "validation": val}
    for spec, evaluator in evaluators.items():
        if evaluator.model_digest not in ("", weights):
            raise UserError(
                f"--protocol {spec} was made for another model than {model}; give the head of this one: its run's "
                "head.safetensors, or one made from its store with compress label-head"
            )
        require_labels(spec, **{which: sets[which] for which in evaluator.needs_labels})


def score_all(
    evaluators: Mapping[str, Evaluator], train: Split, val: Split, augmented: AugmentedFeatures | None, out: Path
) -> Gathered:
    """What the evaluation in OUT has to show: results of these protocols, by spec, and of earlier commands.

    A protocol with a finished result in OUT/results is not run again.
    """
    results = Results(Folder(out), train, val)
    for spec, evaluator in evaluators.items():
        if results.get(evaluator) is None:
            results.put(evaluator, spec, score(evaluator, spec, train, val, augmented, out))
    return results.gather(evaluators.values())


def score(
    evaluator: Evaluator, spec: str, train: Split, val: Split, augmented: AugmentedFeatures | None, out: Path
) -> Result:
    """Run one protocol. Raises UserError if a user's own raises an error or returns what cannot be kept."""
    ours = is_ours(type(evaluator))
    before = None if ours else _digests(train, val)
    try:
        result = evaluator(train, val, out, augmented)
    except UserError:
        raise
    except (Exception, SystemExit) as wrong:
        if ours:
            raise
        raise UserError(f"--protocol {spec} failed: {describe_with_location(wrong)}; {CHECK}") from wrong
    fault = next(find_result_faults(result, train, val), None)
    if before and before != _digests(train, val):  # protocols after it would score what it left
        fault = "has changed the features, labels or rows of a split; work on a copy"
    if fault:
        where = _place_of(type(evaluator))
        raise UserError(f"--protocol {spec}: {type(evaluator).__name__}.__call__{where} {fault}; {CHECK}")
    return result


def _digests(*splits: Split) -> list[str]:
    """Digests of the arrays of splits."""
    arrays = [array for split in splits for array in (split.features, split.label, split.rows)]
    return [digests.digest(np.ascontiguousarray(array).data) for array in arrays]


def _place_of(cls: type[Evaluator]) -> str:
    """Where a class's __call__ is written."""
    try:
        file, (_, line) = inspect.getsourcefile(cls), inspect.getsourcelines(cls.__call__)
    except (OSError, TypeError):
        return ""
    return f" ({Path(file).name}, line {line})" if file else ""
