"""The command line: one command per file in stages/, and the one place that prints results and errors."""

import errno
import importlib
import inspect
import json
import os
import signal
import sys
import typing
from dataclasses import MISSING, fields
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.launch_env import is_launched, is_main_process
from compress_ssl.pipeline.runtime.registry import did_you_mean
from compress_ssl.pipeline.runtime.signals import Interrupted

UsageProblem: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

COMMANDS = {
    "export-teacher": ("export_teacher", "Run the frozen teacher once over every view and keep its embeddings."),
    "distill": ("distill", "Train students from a store of teacher embeddings."),
    "label-head": ("label_head", "A linear head on stored embeddings, fitted to a few labels."),
    "evaluate": ("evaluate", "Nearest neighbours, clusters and linear probes, with a report."),
    "inspect": ("inspect", "What a store, run or evaluation is and how far it got."),
    "verify": ("verify", "Every digest of a store, then the live teacher against a sample; --repair."),
    "store copy": ("store_copy", "Push, pull, cut down or recode a store, digests checked."),
    "compare": ("compare", "One table and page over many evaluations, the teacher first."),
    "sweep": ("sweep", "A grid of students, methods and stores from a YAML file, compared at the end."),
    "models": ("listing:Models", "What can be named as teacher, student or --model."),
    "methods": ("listing:Methods", "What can be named as --method, with the published recipes."),
    "protocols": ("listing:Protocols", "What can be named as --protocol."),
    "demo": ("demo", "The three stages on embedded data, minutes on two cores."),
}
"""Name, or family and name: (module of `compress_ssl.stages`, or module:Config; summary).

A module is imported when its command is asked for.
"""


class Commands(TyperGroup):
    """The command table, or those of its commands that begin with `family`. Listing it imports no stage."""

    family = ""

    def list_commands(self, ctx: Any) -> list[str]:
        words = (name.removeprefix(self.family).split()[0] for name in COMMANDS if name.startswith(self.family))
        return list(dict.fromkeys(words))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        name = self.family + cmd_name
        if any(known.startswith(f"{name} ") for known in COMMANDS):
            group = Commands(name=cmd_name, help=f"Commands for a {name}.", no_args_is_help=True)
            group.family = f"{name} "
            return group
        if name not in COMMANDS:
            raise UserError(f"no command {name!r}{did_you_mean(name, COMMANDS) or '.'} Known: {', '.join(COMMANDS)}")
        where, summary = COMMANDS[name]
        if cmd_name not in sys.argv[1:]:  # only listed
            return TyperCommand(cmd_name, help=summary)
        return _command(cmd_name, where, summary)


app = typer.Typer(cls=Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _root() -> None:
    """Compress a self-supervised vision model into small ones: export its views once, distill many, evaluate."""


def _command(name: str, where: str, summary: str) -> Any:
    """A Typer command from a stage's Config: one option per field."""
    module_name, _, config_name = where.partition(":")
    module = importlib.import_module(f"compress_ssl.stages.{module_name}")
    config = getattr(module, config_name or "Config")
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(name, help=inspect.getdoc(config) or summary)(_function(config, module.run))
    return typer.main.get_command(single)


def _function(config: Any, run: Any) -> Any:
    """A function whose signature is the Config's fields, for Typer to read."""

    def call(**values: Any) -> None:
        as_json = values.pop("json")
        made = run(config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}))
        if made:  # of several ranks the first has something to show
            _show(json.dumps(made, default=str) if as_json else made.get("summary", ""))

    parameters = []
    hints = typing.get_type_hints(config)
    for f in fields(config):
        kind = list[str] if typing.get_origin(hints[f.name]) is tuple else hints[f.name]
        name, short = f.name.replace("_", "-"), f.metadata.get("short")
        either = kind is bool or bool in typing.get_args(kind)
        names = [f"--{name}/--no-{name}" if either else f"--{name}", *([short] if short else [])]
        text = f.metadata.get("help")
        info = typer.Argument(help=text) if f.metadata.get("place") else typer.Option(*names, help=text)
        default = inspect.Parameter.empty if f.default is MISSING else f.default
        default = list(default) if isinstance(default, tuple) else default
        parameters.append(
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])
        )
    as_json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout instead of the summary")]
    parameters.append(inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=as_json))
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call


_DISK = {
    errno.ENOSPC: "the disk is full; make room and repeat the command, it continues where it stopped",
    errno.EDQUOT: "the disk quota is used up; make room and repeat the command, it continues where it stopped",
    errno.EFBIG: "the file size limit was reached (ulimit -f); raise it and repeat the command",
    errno.EACCES: "no permission; choose another folder or change its rights",
    errno.EPERM: "not permitted; choose another folder or change its rights",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another folder",
    errno.EEXIST: "a file stands where a folder is needed; choose another folder",
    errno.EISDIR: "a folder stands where a file is needed",
    errno.ENOENT: "there is no such file or folder",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "symbolic links lead in a circle",
    errno.EMFILE: "too many files are open (ulimit -n); raise the limit, or use fewer --workers",
    errno.EIO: "the disk reports an error; check it, then repeat the command",
}


def main() -> None:
    """Run a command; exit with 0, 2 (the user can mend it), 130 or 143 (signals), 1 (a bug)."""
    signal.signal(signal.SIGTERM, _terminate)
    # Idle OpenMP threads sleep instead of spinning: beside loader processes, spinning made the
    # forward of a small network on two busy cores 15 times slower. Has to be said before torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if is_launched():  # every rank would be warned that it looks for unused parameters where there are none
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        code = _status()
        for signum in (signal.SIGINT, signal.SIGTERM):  # all is said: what comes now has nobody to catch it
            signal.signal(signum, signal.SIG_DFL)
    except Interrupted as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        code = 128 + stop.signum
    except (KeyboardInterrupt, typer.Abort):
        print("stopped: repeat the command to continue", file=sys.stderr)
        code = 130
    sys.exit(code)


def _status() -> int:
    """Run a command: the exit status, its error told in one line. Raises Interrupted and KeyboardInterrupt."""
    try:
        code = app(standalone_mode=False)
        return code if isinstance(code, int) else 0
    except UserError as problem:
        return _fail(str(problem))
    except UsageProblem as problem:
        return _fail(_usage(problem)) if is_main_process() else 2
    except (MemoryError, RuntimeError) as problem:
        if not (text := _exhausted(problem)):
            raise
        return _fail(text)
    except OSError as problem:
        if problem.errno not in _DISK:
            raise
        return _fail(f"{problem.filename2 or problem.filename or 'writing'}: {_DISK[problem.errno]}")


def _show(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `compress models | head`: the work is done, and whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit has somewhere to go


def _fail(text: str) -> int:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return 2


def _exhausted(problem: Exception) -> str:
    """In words, if memory ran out or a loader process died of it; torch has no one type for these. Else nothing."""
    text = " ".join(str(problem).split())
    signs = ("killed by signal", "exited unexpectedly", "shared memory", "No space left on device")
    if "DataLoader worker" in text and any(sign in text for sign in signs):
        return (
            f"a loader process died ({text[:160]}); use fewer --workers (0: none), or give them more memory "
            "(docker run --shm-size), and repeat the command, it continues where it stopped"
        )
    named = type(problem).__name__ in ("MemoryError", "_ArrayMemoryError", "OutOfMemoryError")
    if named or "can't allocate memory" in text:
        return f"the memory is full ({text[:160]}); take a smaller batch where the command has one, or fewer students"
    return ""


def _usage(problem: Any) -> str:
    """What is wrong with the flags, and where they are listed."""
    text = problem.format_message().strip().rstrip(".") or "no command was given"
    where = problem.ctx.command_path if problem.ctx else ""
    return f"{text}; {where} --help lists what there is" if where else text


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Interrupted(signum, "repeat the command to continue")


if __name__ == "__main__":
    main()
