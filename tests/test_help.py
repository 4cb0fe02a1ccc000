"""The pages that --help prints, and the choices of flags."""

import dataclasses
import importlib
import os
import subprocess
import sys
import typing
from dataclasses import MISSING, Field, fields
from types import NoneType
from typing import Any

import pytest
import torch

from compress_ssl import cli
from compress_ssl.pipeline.models.precision import PRECISIONS
from compress_ssl.pipeline.runtime.choices import Precision
from compress_ssl.pipeline.runtime.config import check_choices, choices, flag, flag_name, plain_types, require, to_flags
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.help_page import FIRST_COLUMN, format_page, help_text, sections_of
from compress_ssl.pipeline.training.choices import OptimizerName
from compress_ssl.pipeline.training.optimizers import make_optimizer
from compress_ssl.pipeline.views.policies import POLICIES, Policy

WIDTHS = (50, 80, 120)
HEAVY = {"torch", "torchvision", "timm", "faiss", "zarr", "dask", "distributed", "jinja2", "psutil"}
BIG = ("export-teacher", "distill", "evaluate")


def stage_of(command: str) -> tuple[Any, Any]:
    """(module, Config class) of a command."""
    module_name, _, config_name = cli.COMMANDS[command][0].partition(":")
    module = importlib.import_module(f"compress_ssl.stages.{module_name}")
    return module, getattr(module, config_name or "Config")


FLAGS = [(command, f) for command in cli.COMMANDS for f in fields(stage_of(command)[1])]
FLAG_IDS = [f"{command} {f.name}" for command, f in FLAGS]


def hint_of(command: str, of: Field[Any]) -> Any:
    return typing.get_type_hints(stage_of(command)[1])[of.name]


CHOICES = [(command, f) for command, f in FLAGS if choices(hint_of(command, f))]
CHOICE_IDS = [f"{command} {f.name}" for command, f in CHOICES]


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """A function that returns the page of a command on a terminal of some width."""

    def read(command: str, width: int = 80) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr("sys.argv", ["compress", *command.split(), "--help"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        return capsys.readouterr().out

    return read


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """The one error line of a command that is refused."""
    monkeypatch.setattr("sys.argv", ["compress", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1
    return lines[0].removeprefix("error: ")


def placeholders(config: Any, **more: Any) -> Any:
    """A Config with a word for every flag that is required."""
    hints = typing.get_type_hints(config)
    required = {f.name: ("x",) if typing.get_origin(hints[f.name]) is tuple else "x" for f in fields(config)
                if f.default is MISSING}  # fmt: skip
    return config(**{**required, **more})


# ---------------------------------------------------------------- the page


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("command", ["", "store", *cli.COMMANDS])
def test_no_line_of_a_page_is_wider_than_the_terminal_and_nothing_is_cut(page: Any, command: str, width: int) -> None:
    text = page(command, width)
    assert max(map(len, text.splitlines())) <= min(width, 100)
    assert "…" not in text
    words = text.split()
    assert [word for word in words if word.endswith("-")] == [], "a word is cut at its hyphen"


def test_the_pages_of_all_commands_are_printed_without_any_heavy_package() -> None:
    program = (
        "import sys; from compress_ssl import cli\n"
        "for command in cli.COMMANDS:\n"
        "    sys.argv = ['compress', *command.split(), '--help']\n"
        "    try: cli.main()\n"
        "    except SystemExit as stop: assert not stop.code, (command, stop.code)\n"
        f"loaded = sorted(set(sys.modules) & {HEAVY!r}); assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: ") == len(cli.COMMANDS)


def test_the_list_of_commands_is_printed_in_less_than_half_a_second_of_processor_time() -> None:
    seconds = []
    for _ in range(3):
        before = os.times()
        program = "import sys; sys.argv = ['compress', '--help']; from compress_ssl import cli; cli.main()"
        subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=60)
        after = os.times()
        used = after.children_user - before.children_user + after.children_system - before.children_system
        seconds.append(used)
    assert min(seconds) < 0.5


@pytest.mark.parametrize("group", ["", "store"])
def test_without_a_command_the_page_is_printed_and_the_error_says_that_none_was_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], page: Any, group: str
) -> None:
    expected = page(group)
    monkeypatch.setattr("sys.argv", ["compress", *group.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out.strip() == expected.strip()
    assert said.err.startswith("error: No command was given; ") and said.err.count("\n") == 1


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("command, of", FLAGS, ids=FLAG_IDS)
def test_every_flag_is_on_the_page_with_its_whole_help_in_reading_order(
    page: Any, command: str, of: Field[Any], width: int
) -> None:
    text = " ".join(page(command, width).split())
    help = " ".join(of.metadata["help"].split())
    assert f" {help} " in text
    names = text.partition(f" {help} ")[0].split()[-5:]
    assert of.metadata["place"] or f"--{flag_name(of.name)}" in names
    assert of.metadata["short"] in ("", names[-3].rstrip(","))


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_text_column_is_at_least_half_of_80_columns_wide(page: Any, command: str) -> None:
    for line in page(command).splitlines():
        margin = len(line) - len(line.lstrip())
        assert margin <= FIRST_COLUMN + 4 < 40


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_page_names_exactly_the_options_that_the_parser_takes(page: Any, command: str) -> None:
    rows = [line for line in page(command).splitlines() if line.startswith("  -") and line[2] != " "]
    shown = {word.rstrip(",") for line in rows for word in line.split("  ")[1].split() if word.startswith("-")}
    where, summary = cli.COMMANDS[command]
    params = cli._command(command, where, summary).params
    options = [param for param in params if param.param_type_name == "option"]
    taken = {name for param in options for name in param.opts}
    off = {name for param in options if param.default is False for name in param.secondary_opts}
    assert shown == taken | {name for param in options for name in param.secondary_opts} - off | {"--help"}


@pytest.mark.parametrize("command", BIG)
def test_the_flags_of_a_big_command_are_in_panels_of_a_page_each(page: Any, command: str) -> None:
    titles = [line for line in page(command).splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == [f"{name}:" for name in ("What", "Recipe", "Views", "Speed", "Output") if f"{name}:" in titles]
    assert len(titles) >= 3
    sections = sections_of(stage_of(command)[1])
    assert [f"{name}:" for name in sections] == titles
    assert max(map(len, sections.values())) <= 14


@pytest.mark.parametrize("command, of", FLAGS, ids=FLAG_IDS)
def test_a_flag_has_whole_sentences_of_help_that_say_the_default(command: str, of: Field[Any]) -> None:
    text = of.metadata["help"]
    assert text[0].isupper() and text.endswith(".") and not text.endswith("...")
    shown = help_text(of)
    if of.default is MISSING:
        assert shown.endswith(" Required.")
    elif of.default is not False:
        assert shown.count("Default: ") == 1
    if of.default is None or of.default == "":
        assert "Default: " in text, "None says nothing to a reader: the help itself must say what is done"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_summary_of_a_command_is_a_whole_sentence(page: Any, command: str) -> None:
    summary = cli.COMMANDS[command][1]
    assert summary[0].isupper() and summary.endswith(".")
    assert " ".join(summary.split()) in " ".join(page(" ".join(command.split()[:-1])).split())


@dataclasses.dataclass(frozen=True)
class Example:
    """A Config with one flag of every kind."""

    file: str = flag(help="A file.", metavar="FILE", place=True)
    rate: float = flag(0.5, "A rate.")
    whole: float = flag(2.0, "A number.")
    on: bool = flag(True, "A switch.")
    off: bool = flag(False, "Another switch.")
    unset: bool | None = flag(None, "A third switch. Default: as published.", panel="Recipe")
    kind: typing.Literal["a", "b"] | None = flag(None, "A choice. Default: a.", panel="Recipe", short="-k")
    kinds: tuple[typing.Literal["a", "b"], ...] = flag(("a", "b"), "Choices.", panel="Recipe")


def test_a_page_says_the_default_and_the_values_of_flags_of_every_kind() -> None:
    assert sections_of(Example) == {
        "What": [
            ("FILE", "A file. Required."),
            ("--rate X", "A rate. Default: 0.5."),
            ("--whole X", "A number. Default: 2."),
            ("--on / --no-on", "A switch. Default: on."),
            ("--off", "Another switch."),
        ],
        "Recipe": [
            ("--unset / --no-unset", "A third switch. Default: as published."),
            ("-k, --kind a|b", "A choice. Default: a."),
            ("--kinds a|b", "Choices. Default: a, b."),
        ],
    }


def test_a_long_name_stands_on_a_line_of_its_own_and_no_word_is_cut() -> None:
    rows = {"Options": [("--short", "text " * 30 + "--a-flag-with-hyphens"), ("--long" * 8, "w" * 90)]}
    lines = format_page("A page.", rows, 40).splitlines()
    assert f"  {'--long' * 8}" in lines and lines[-1] == " " * 11 + "w" * 90
    assert lines[-3].split()[-1] == "--a-flag-with-hyphens"
    assert lines[4] == "  --short  text text text text text text"[:40].rstrip()


# ---------------------------------------------------------------- numbers


NUMBERS = [(command, f) for command, f in FLAGS if {int, float} & set(plain_types(hint_of(command, f)))]


@pytest.mark.parametrize("command, of", NUMBERS, ids=[f"{command} {f.name}" for command, f in NUMBERS])
def test_a_word_in_place_of_a_number_is_refused_with_the_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, of: Field[Any]
) -> None:
    words = to_flags(placeholders(stage_of(command)[1], **{of.name: "1.5.2"}))
    said = refusal(monkeypatch, capsys, [*command.split(), *words])
    number = "whole number" if int in plain_types(hint_of(command, of)) else "number"
    assert said == f"--{flag_name(of.name)} is 1.5.2, but must be a {number}"


# ---------------------------------------------------------------- choices


@pytest.mark.parametrize("command, of", CHOICES, ids=CHOICE_IDS)
def test_the_page_shows_the_choices_of_a_flag(page: Any, command: str, of: Field[Any]) -> None:
    known = "|".join(choices(hint_of(command, of)))
    assert f" --{flag_name(of.name)} {known} " in " ".join(page(command).split())


@pytest.mark.parametrize("command, of", CHOICES, ids=CHOICE_IDS)
def test_a_wrong_choice_is_refused_in_the_same_words_on_the_command_line_and_in_python(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, of: Field[Any]
) -> None:
    module, config = stage_of(command)
    known = choices(hint_of(command, of))
    wrong = placeholders(config, **{of.name: known[0] + "x"})
    said = refusal(monkeypatch, capsys, [*command.split(), *to_flags(wrong)])
    assert said.startswith(f"--{flag_name(of.name)} is {known[0]}x, but must be one of {', '.join(known)}")
    assert said.endswith(f"; did you mean {known[0]!r}?")
    with pytest.raises(UserError) as refused:
        module.run(wrong)
    assert str(refused.value) == said


@pytest.mark.parametrize("command, of", CHOICES, ids=CHOICE_IDS)
def test_none_is_a_choice_in_python_only_where_the_type_says_so(command: str, of: Field[Any]) -> None:
    module, config = stage_of(command)
    with pytest.raises(UserError) as refused:  # the store, the run, the student: x names nothing
        module.run(placeholders(config, **{of.name: None}))
    allowed = NoneType in typing.get_args(hint_of(command, of))
    assert (f"--{flag_name(of.name)} is None, but must be one of" in str(refused.value)) is not allowed


def test_a_wrong_member_of_several_choices_is_refused() -> None:
    check_choices(Example("x", kinds=("b",)))
    with pytest.raises(UserError, match="--kinds is c, but must be one of a, b"):
        check_choices(Example("x", kinds=("a", "c")))  # type: ignore[arg-type]


def test_the_plain_types_of_a_choice_are_those_of_its_text() -> None:
    assert plain_types(typing.Literal["a", "b"] | None) == (str, NoneType)
    assert plain_types(float | None) == (float, NoneType)
    assert plain_types(int) == (int,)


def test_every_precision_and_policy_is_in_the_table_of_its_room() -> None:
    assert tuple(PRECISIONS) == typing.get_args(Precision)
    assert tuple(POLICIES) == typing.get_args(Policy)


@pytest.mark.parametrize("name", typing.get_args(OptimizerName))
def test_every_optimizer_that_can_be_chosen_can_be_built(name: str) -> None:
    optimizer = make_optimizer(name, torch.nn.Linear(2, 2), lr=0.1, momentum=0.9, weight_decay=0.0, norm_decay=True)
    assert optimizer.param_groups


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_number_that_is_not_finite_is_refused_also_where_no_rule_names_its_flag(value: float) -> None:
    config = placeholders(stage_of("distill")[1], lr=value)
    with pytest.raises(UserError, match=f"--lr is {value}, but must be a finite number"):
        require(config, {})
