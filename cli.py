"""The command line: one command per module of stages/. Only this module prints results and errors.

`compress --help` must take less than half a second, so nothing here imports torch or a stage before a command is run.
"""

import importlib
import inspect
import json
import os
import signal
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from compress_ssl.pipeline.runtime.config import check_choices, choices, flag_name, plain_types
from compress_ssl.pipeline.runtime.errors import UserError, describe_disk_error, describe_exhaustion
from compress_ssl.pipeline.runtime.help_page import Rows, format_page, sections_of, value_name
from compress_ssl.pipeline.runtime.launch_env import is_launched, is_main_process
from compress_ssl.pipeline.runtime.signals import Interrupted
from compress_ssl.pipeline.runtime.spec import did_you_mean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from typer._click.core import Command as AnyCommand
    from typer._click.core import Context
    from typer._click.exceptions import ClickException
    from typer._click.formatting import HelpFormatter

# Typer contains a copy of click, or depends on it, according to its version: the base class of usage errors is found
# by its name.
UsageProblem: "type[ClickException]" = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

COMMANDS = {
    "export-teacher": ("export_teacher", "Run the frozen teacher once over every view and store its embeddings."),
    "distill": ("distill", "Train students from a store of teacher embeddings."),
    "label-head": ("label_head", "Fit a linear head on stored embeddings to a few labels."),
    "evaluate": ("evaluate", "Score by nearest neighbours, clusters and linear probes, with a report."),
    "inspect": ("inspect", "Show what a store, run or evaluation contains and how far it is."),
    "verify": ("verify", "Check every digest of a store and a sample against the live teacher; --repair."),
    "store copy": ("store_copy", "Push, pull, reduce or recode a store; digests are checked."),
    "compare": ("compare", "Compare many evaluations in one table and page, the teacher first."),
    "sweep": ("sweep", "Train and compare a grid of students, methods and stores from a YAML file."),
    "datasets": ("listing:Datasets", "List what --data, --train and --val accept."),
    "models": ("listing:Models", "List what --teacher, --student and --model accept."),
    "methods": ("listing:Methods", "List what --method accepts."),
    "protocols": ("listing:Protocols", "List what --protocol accepts."),
    "demo": ("demo", "Run the three stages on images inside scikit-learn; takes minutes on two cores."),
}
"""{command, or "group command": (module of `compress_ssl.stages`, or module:Config; summary for --help)}

A module is imported only when its command is run or its own --help is shown.
"""


SETTINGS: dict[str, object] = {"max_content_width": 100}
"""Of every command: the help is as wide as the terminal, but its lines grow no longer than this."""

JSON = ("--json", "Print one JSON object on stdout instead of the summary.")
HELP = ("--help", "Show this page and exit.")


class Command(TyperCommand):
    """A command whose --help has one section for each panel of its Config."""

    sections: Mapping[str, Rows] = {}

    def format_help(self, ctx: "Context", formatter: "HelpFormatter") -> None:
        """Write the page to the formatter."""
        self.format_usage(ctx, formatter)
        formatter.write(format_page(self.help or "", self.sections, formatter.width))


class Commands(TyperGroup):
    """The commands of COMMANDS whose names begin with `prefix`. Listing them imports no stage.

    A command that is only listed has no options; its stage is imported when the parser resolves the command.
    """

    prefix = ""

    def parse_args(self, ctx: "Context", args: list[str]) -> list[str]:
        """The arguments that are left for the command. Without any, the page is printed, and it is a usage error."""
        if not args:
            _print(ctx.get_help())
            ctx.fail("No command was given")
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: "Context") -> list[str]:
        """The first words of the commands' names, after the prefix and without repetition."""
        words = (name.removeprefix(self.prefix).split()[0] for name in COMMANDS if name.startswith(self.prefix))
        return list(dict.fromkeys(words))

    def get_command(self, ctx: "Context", cmd_name: str) -> "AnyCommand":
        """A group, or a command with its summary alone. Raises UserError for an unknown name."""
        name = self.prefix + cmd_name
        if any(known.startswith(f"{name} ") for known in COMMANDS):
            group = Commands(name=cmd_name, help=f"Commands for a {name}.", context_settings=SETTINGS)
            group.prefix = f"{name} "
            return group
        if name not in COMMANDS:
            raise UserError(f"no command {name!r}{did_you_mean(name, COMMANDS) or '.'} Known: {', '.join(COMMANDS)}")
        return TyperCommand(cmd_name, help=COMMANDS[name][1])

    def format_help(self, ctx: "Context", formatter: "HelpFormatter") -> None:
        """Write the page to the formatter: the commands and their summaries."""
        names = self.list_commands(ctx)
        summaries = [(name, COMMANDS.get(self.prefix + name, ("", f"Commands for a {name}."))[1]) for name in names]
        self.format_usage(ctx, formatter)
        sections: dict[str, Rows] = {"Commands": summaries, "Options": [HELP]}
        formatter.write(format_page(self.help or "", sections, formatter.width))

    def resolve_command(self, ctx: "Context", args: list[str]) -> tuple[str | None, "AnyCommand | None", list[str]]:
        """The command to run for these arguments, with all its options, as (name, command, remaining arguments)."""
        name, command, rest = super().resolve_command(ctx, args)
        full_name = f"{self.prefix}{name}"
        if full_name in COMMANDS:
            command = _command(str(name), *COMMANDS[full_name])
        return name, command, rest


app = typer.Typer(cls=Commands, add_completion=False, pretty_exceptions_enable=False, context_settings=SETTINGS)


@app.callback()
def _root() -> None:
    """Compress a self-supervised vision model into small ones: export its views once, distill many, evaluate."""


def _command(name: str, where: str, summary: str) -> Command:
    """A Typer command with one option per field of a stage's Config. where: module, or module:Config."""
    module_name, _, config_name = where.partition(":")
    module = importlib.import_module(f"compress_ssl.stages.{module_name}")
    config = getattr(module, config_name or "Config")
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    described = single.command(name, cls=Command, help=inspect.getdoc(config) or summary, context_settings=SETTINGS)
    described(_function(config, module.run))
    command = typer.main.get_command(single)
    assert isinstance(command, Command)
    sections = sections_of(config)
    last = next(reversed(sections))
    command.sections = {**sections, last: [*sections[last], JSON, HELP]}
    return command


# `run` takes its own stage's Config and a flag's value has any type, which is why they are Any in this section.
def _function(config: "type[DataclassInstance]", run: Callable[[Any], Mapping[str, object]]) -> Callable[..., None]:
    """A function that calls `run` with a Config. Typer reads the options from its signature, one per field."""

    def call(**values: Any) -> None:
        as_json = values.pop("json")
        settings = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        made = config(**settings)
        check_choices(made)
        result = run(made)
        if result:  # only rank 0 of several ranks returns a result
            _print(json.dumps(result, default=str) if as_json else str(result.get("summary", "")))

    hints = typing.get_type_hints(config)
    parameters = [_parameter(field, hints[field.name]) for field in fields(config)]
    as_json = Annotated[bool, typer.Option("--json")]
    parameters.append(inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=as_json))
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call


def _parameter(field: Field[Any], hint: object) -> inspect.Parameter:
    """A field of a Config as a parameter that Typer reads as an option, or as an argument if the field has `place`."""
    # Choices are text for the parser: `check_choices` refuses a wrong one in the same words as for Python.
    kind = list[str] if typing.get_origin(hint) is tuple else str | None if choices(hint) else hint
    name, short = flag_name(field.name), field.metadata["short"]
    is_switch = kind is bool or bool in typing.get_args(kind)
    names = [f"--{name}/--no-{name}" if is_switch else f"--{name}"]
    if short:
        names.append(short)
    number = next((each for each in (int, float) if each in plain_types(hint)), None)
    parser = partial(_parse_number, f"--{name}", number) if number else None
    place = field.metadata["place"]
    info = typer.Argument(metavar=value_name(field, hint)) if place else typer.Option(*names, parser=parser)
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    if isinstance(default, tuple):
        default = list(default)
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
    )


def _parse_number(flag: str, kind: type[int] | type[float], value: str) -> int | float:
    """The value of a flag as a number. Raises UserError: Typer's own words do not say what was given."""
    try:
        return kind(value)
    except ValueError:
        raise UserError(f"{flag} is {value}, but must be a {'whole ' * (kind is int)}number") from None


# ---------------------------------------------------------------- running a command, exit status and errors


def main() -> None:
    """Run the command in sys.argv and exit.

    The exit status is 0 (success), 2 (an error that the user can correct), 130 or 143 (stopped by SIGINT or SIGTERM)
    or 1 (a bug, with a traceback).
    """
    signal.signal(signal.SIGTERM, _terminate)
    # Idle OpenMP threads sleep instead of spinning: with loader processes beside them, spinning made the forward
    # pass of a small network on two busy cores 15 times slower. The variable must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if is_launched():  # otherwise every rank prints a needless warning about find_unused_parameters
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        code = _run_command()
        for signum in (signal.SIGINT, signal.SIGTERM):  # output is complete: restore the default handlers
            signal.signal(signum, signal.SIG_DFL)
    except Interrupted as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        code = 128 + stop.signum
    except (KeyboardInterrupt, typer.Abort):
        print("stopped: repeat the command to continue", file=sys.stderr)
        code = 130
    sys.exit(code)


def _run_command() -> int:
    """Run the command and return the exit status; an error that the user can correct is printed in one line.

    Raises Interrupted, KeyboardInterrupt, and every other exception, which is a bug.
    """
    try:
        code = app(standalone_mode=False)
        if code == 128 + signal.SIGINT:  # Typer turns KeyboardInterrupt into this status, without a word to the user
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except UserError as problem:
        return _fail(str(problem))
    except UsageProblem as problem:
        return _fail(_describe_usage_error(problem)) if is_main_process() else 2
    except (MemoryError, RuntimeError) as problem:
        text = describe_exhaustion(problem)
        if not text:
            raise
        return _fail(text)
    except OSError as problem:
        text = describe_disk_error(problem)
        if not text:
            raise
        return _fail(text)


def _print(text: str) -> None:
    """Print a result to stdout. What its encoding lacks, such as half a surrogate in a record, is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:  # the reader closed the pipe, as in `compress models | head`: no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit must not fail again


def _fail(text: str) -> int:
    """Print an error in one line to stderr; returns the exit status. Control characters of a file are escaped."""
    line = " ".join(text.split())
    shown = "".join(c if c.isprintable() or c.isspace() else c.encode("unicode_escape").decode() for c in line)
    print(f"error: {shown}", file=sys.stderr)
    return 2


def _describe_usage_error(problem: "ClickException") -> str:
    """What is wrong with the arguments, and which --help lists the valid ones."""
    text = problem.format_message().strip().rstrip(".")
    context = getattr(problem, "ctx", None)
    where = context.command_path if context else ""
    return f"{text}; {where} --help lists commands and options" if where else text


def _terminate(signum: int, frame: FrameType | None) -> None:
    """Signal handler for SIGTERM outside a StopRequest block."""
    raise Interrupted(signum, "repeat the command to continue")


if __name__ == "__main__":
    main()
