"""A student as a command uses it: its spec, with what a run in its folder recorded for the keys that are not given."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from compress_ssl.pipeline.models import MODELS
from compress_ssl.pipeline.models.factory import ModelOptions
from compress_ssl.pipeline.runtime.artifact import MANIFEST
from compress_ssl.pipeline.runtime.options import Option, Options, option_text, recordable, require_types
from compress_ssl.pipeline.runtime.records import UNSET
from compress_ssl.pipeline.runtime.registry import PYTHON
from compress_ssl.pipeline.runtime.signatures import any_key, convert, is_required, positional_parameters
from compress_ssl.pipeline.runtime.spec import Spec, parse
from compress_ssl.pipeline.training.run_record import RunRecord
from compress_ssl.pipeline.training.version1_defaults import STUDENT_OPTIONS
from compress_ssl.pipeline.views.preprocessing import Preprocessing


@dataclass(frozen=True)
class StudentChoice:
    """A student's spec, its own options, the size of its images and the folder of its run."""

    words: str  # the spec as it was typed when the run was begun: for its record, its seed and messages
    spec: str  # the same with the own options that are not today's defaults, to build the network from
    options: Options  # its own options; empty for a network of another library
    image_size: int | None  # side in pixels; None: the student's own
    folder: Path
    recorded: Options | None = None  # own options with which the run in the folder was begun; None: no run
    preprocessing: Preprocessing | None = None  # likewise, of the images; None: the network's own


def choose_student(text: str, folder: Path, record: RunRecord | None, image_size: int | None) -> StudentChoice:
    """The student of a spec as typed, in a folder that may hold a run of it.

    Keys that the spec does not give are those of the recorded spec, if both name the same network. Raises UserError
    for an unknown kind of model and for a value of the wrong type.
    """
    typed = MODELS.parse(text)
    own = own_parameters(typed)
    pair = _matching_specs(typed, record, own) if record else None
    if record is None or pair is None:
        options = {**_defaults(own), **_given(typed, own)}
        return StudentChoice(text, str(_with_options(typed, own, options)), options, image_size, folder)
    # ---------------------------------------------------------------- the run in the folder is one of this network
    typed, there = pair
    saved, saved_options = record.identity.student, record.identity.student.options or {}
    require_types(saved_options, own, f"{folder}/{MANIFEST}: identity.student.options")
    recorded = {**_defaults(own), **STUDENT_OPTIONS.get(typed.kind, {}), **_given(there, own), **saved_options}
    options = {**{name: value for name, value in recorded.items() if name in own}, **_given(typed, own)}
    spec = Spec(typed.kind, typed.argument or there.argument, {**there.options, **typed.options})
    same_words = _foreign(spec, own) == _foreign(there, own)
    words = saved.spec if same_words else text
    size = image_size if image_size or "size" in typed.options else saved.preprocessing.size
    built_from = str(_with_options(spec, own, options))
    return StudentChoice(words, built_from, options, size, folder, recorded, saved.preprocessing)


def own_parameters(spec: Spec) -> dict[str, inspect.Parameter]:
    """{option: its parameter} of the own options of a network of ours or a user's that have a default.

    The argument is included. Empty for a kind that passes its keys on to another library.
    """
    member = MODELS.member(spec)
    if any_key(member.signature) and not member.user:
        return {}
    without = {f.name for f in fields(ModelOptions)}
    if spec.kind == PYTHON:  # the argument is the place of the function
        without |= {p.name for p in positional_parameters(member.signature)}
    parameters = [p for p in member.signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    return {p.name: p for p in parameters if p.name not in without and not is_required(p)}


def _matching_specs(typed: Spec, record: RunRecord, own: Mapping[str, inspect.Parameter]) -> tuple[Spec, Spec] | None:
    """The asked spec and the recorded one, both as typed or both with absolute paths; None for two networks.

    As typed comes first: a run and the user's file may have been moved together.
    """
    located = MODELS.locate(str(typed)), MODELS.locate(record.student_spec)
    pairs = [(typed, parse(record.identity.student.spec)), located]
    same = [pair for pair in pairs if _same_network(*pair, own)]
    agreeing = [(one, there) for one, there in same if _foreign(one, own).items() <= _foreign(there, own).items()]
    return next(iter(agreeing or same), None)


def _same_network(one: Spec, other: Spec, own: Mapping[str, inspect.Parameter]) -> bool:
    """Whether two specs name one network, except for its options."""
    return one.kind == other.kind and (_argument_name(own) is not None or one.argument == other.argument)


def _argument_name(own: Mapping[str, inspect.Parameter]) -> str | None:
    """The own option that the argument of a spec gives; None if there is none."""
    return next((name for name, p in own.items() if p.kind is inspect.Parameter.POSITIONAL_ONLY), None)


def _defaults(own: Mapping[str, inspect.Parameter]) -> dict[str, Option]:
    return recordable({name: p.default for name, p in own.items()})


def _given(spec: Spec, own: Mapping[str, inspect.Parameter]) -> dict[str, Option]:
    """The own options that a spec gives."""
    argument = _argument_name(own)
    texts = {key: text for key, text in spec.options.items() if key in own and key != argument}
    if argument and spec.argument:
        texts[argument] = spec.argument
    places = {key: f"{spec.kind}:" if key == argument else f"{spec.kind} {key}=" for key in texts}
    return recordable({key: convert(text, own[key], places[key]) for key, text in texts.items()})


def _foreign(spec: Spec, own: Mapping[str, inspect.Parameter]) -> dict[str, str]:
    """The options of a spec that are not the network's own."""
    return {key: text for key, text in spec.options.items() if key not in own or key == _argument_name(own)}


def _with_options(spec: Spec, own: Mapping[str, inspect.Parameter], options: Options) -> Spec:
    """The spec with every own option that is not what its parameter has by default, and with the argument."""
    argument, defaults = _argument_name(own), _defaults(own)
    changed = {key: value for key, value in options.items() if key == argument or value != defaults.get(key, UNSET)}
    texts = {key: option_text(value) for key, value in changed.items()}
    head = texts.pop(argument, "") if argument else spec.argument
    return Spec(spec.kind, head, {**_foreign(spec, own), **texts})
