"""Protocols of an evaluation that has begun: keys that a spec does not give are those of the result of these words."""

from pathlib import Path

from compress_ssl.pipeline.evaluators import PROTOCOLS
from compress_ssl.pipeline.evaluators.base import Evaluator
from compress_ssl.pipeline.evaluators.results import ResultRecord, code_of, options_of
from compress_ssl.pipeline.runtime.options import Option, option_text, to_option
from compress_ssl.pipeline.runtime.records import InvalidRecord, JsonObject, UnsetType, parse_json, read_record
from compress_ssl.pipeline.runtime.spec import Spec
from compress_ssl.pipeline.runtime.storage import Folder


def build_protocol(text: str, out: Path) -> Evaluator:
    """The protocol of a spec, for the evaluation in OUT.

    So a default of a protocol that is changed does not change an evaluation that has begun. Raises UserError for a
    spec that cannot be built.
    """
    evaluator: Evaluator = PROTOCOLS.build(text)
    spec, now = PROTOCOLS.parse(text), options_of(evaluator)
    keys = PROTOCOLS.member(spec).keys()
    kept: dict[str, Option] = {}
    for key, value in _recorded_options(evaluator, text, out).items():
        option = to_option(value)
        if key in keys and key not in spec.options and value != now.get(key) and not isinstance(option, UnsetType):
            kept[key] = option
    if not kept:
        return evaluator
    texts = {key: option_text(value) for key, value in kept.items()}
    return PROTOCOLS.build(Spec(spec.kind, spec.argument, {**spec.options, **texts}))


def _recorded_options(evaluator: Evaluator, text: str, out: Path) -> JsonObject:
    """The options of the result of these words; {} if there is none, or if the user's file has changed since."""
    folder = Folder(out)
    for name in sorted(key for key in folder.list("results") if key.endswith(".json")):
        try:
            record = read_record(ResultRecord, parse_json(folder.get(name), name), name)
        except (InvalidRecord, OSError):
            continue  # the result is computed again
        if (record.name, record.protocol, record.code) == (evaluator.name, text, code_of(type(evaluator))):
            return record.options
    return {}
