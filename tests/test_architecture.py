"""Which modules may import which, checked in the source; see docs/architecture.md."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.registry import Registry

# ---------------------------------------------------------------- the rules

ORDER = (
    "runtime < distributed < datasets < views < store < models < methods, extraction < search "
    "< training < evaluators < report < testing < stages < cli"
)
"""A package imports the ones before it; between two commas stand peers, which do not import each other."""

LAYERS = {name.strip(): number for number, peers in enumerate(ORDER.split("<")) for name in peers.split(",")}

COMMANDS_OF_COMMANDS = {"stages.demo", "stages.sweep"}
"""The stages that may import other stages."""

FLAGS_OF_A_COMMAND = {"stages.distill": "stages.distill_config"}
"""{stage: the file of its Config}, where both in one file would have more than 300 lines."""

HOMES = {
    "typer": {"cli.py"},
    "click": {"cli.py"},
    "zarr": {"pipeline/store/layout.py"},
    "numcodecs": {"pipeline/store/layout.py", "pipeline/store/shard_reader.py"},
    "google_crc32c": {"pipeline/store/shard_reader.py"},
    "dask": {"pipeline/extraction/cluster.py"},
    "distributed": {"pipeline/extraction/cluster.py"},
    "faiss": {"pipeline/search/", "pipeline/store/codecs.py"},
    "obstore": {"pipeline/runtime/object_store.py"},
    "psutil": {"pipeline/runtime/process.py"},
    "jinja2": {"pipeline/report/html.py"},
    "timm": {"pipeline/models/", "pipeline/training/optimizers.py", "pipeline/distributed/collectives.py"},
    "torchvision": {"pipeline/models/", "pipeline/views/", "pipeline/datasets/"},
}
"""Third-party package: the files, or the folders, that may import it."""

LIGHT = {"cli", "__init__", "stages.*"} | {
    f"pipeline.runtime.{name}" for name in ("artifact", "config", "errors", "lease", "registry", "storage")
}
HEAVY = {"torch", "torchvision", "timm", "faiss", "zarr", "dask", "distributed", "jinja2", "psutil"}
"""Loading a LIGHT file or a package's own __init__ must not load a HEAVY package: `--help` and refused flags do not
wait for torch."""

NAMES_OF_NOTHING = {"utils", "util", "misc", "common", "helpers", "helper", "core", "manager"}

GLOBAL_STATE = {
    "os.environ", "os.getenv", "os.putenv", "os.unsetenv", "os.umask", "os.chdir",
    "random.seed", "np.random.seed", "numpy.random.seed", "torch.manual_seed", "torch.cuda.manual_seed_all",
    "torch.set_num_threads", "torch.set_default_dtype", "torch.set_default_device",
    "torch.use_deterministic_algorithms", "torch.set_float32_matmul_precision",
    "warnings.filterwarnings", "warnings.simplefilter", "logging.basicConfig", "signal.signal",
    "atexit.register", "multiprocessing.set_start_method", "torch.multiprocessing.set_sharing_strategy",
    "matplotlib.use", "sys.path", "sys.setrecursionlimit", "faiss.omp_set_num_threads",
}  # fmt: skip
"""Not to be read or changed by an import, in any expression."""

# ---------------------------------------------------------------- reading the tree

ROOT = Path(__file__).resolve().parent.parent


class Import(NamedTuple):
    line: int
    module: str
    lazy: bool  # inside a function
    typing: bool  # under `if TYPE_CHECKING:`


def sources(*folders: str) -> list[Path]:
    return [*ROOT.glob("*.py"), *(path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))]


OURS = sources("pipeline", "stages")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "compress_ssl"


PACKAGE = "compress_ssl"  # the one import name; below, our modules are named without it


def bare(module: str) -> str:
    """`compress_ssl.pipeline.store.feature_store.feature_store` -> `pipeline.store`"""
    return module.removeprefix(f"{PACKAGE}.")


FILES = {module_of(path): path for path in OURS}
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in FILES.items()}


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a chain of attributes, "" of anything else."""
    if isinstance(node, ast.Attribute):
        below = dotted(node.value)
        return f"{below}.{node.attr}" if below else ""
    return node.id if isinstance(node, ast.Name) else ""


def guarded(node: ast.AST) -> str:
    """ "typing" for `if TYPE_CHECKING:`, "main" for `if __name__ == "__main__":`, else ""."""
    if not isinstance(node, ast.If):
        return ""
    if dotted(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        return "typing"
    if isinstance(node.test, ast.Compare) and dotted(node.test.left) == "__name__":
        return "main"
    return ""


def imports(name: str) -> list[Import]:
    """All imports of a module, in functions too; `from package import submodule` names the submodule."""
    return list(_imports(TREES[name], name, False, False))


def _imports(node: ast.AST, name: str, lazy: bool, typing: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(child.lineno, bare(alias.name), lazy, typing) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = bare(child.module or "")
            if child.level:
                package = name.split(".") if FILES[name].name == "__init__.py" else name.split(".")[:-1]
                above = package[: len(package) - child.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            names = [f"{base}.{alias.name}" for alias in child.names]
            found = [full if full in FILES else base for full in names]
            yield from (Import(child.lineno, module, lazy, typing) for module in dict.fromkeys(found))
        else:
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if guarded(child) == "typing":
                assert isinstance(child, ast.If)
                for part in child.body:
                    yield from _imports(ast.Module([part], []), name, lazy, True)
                yield from _imports(ast.Module(child.orelse, []), name, lazy, typing)
            else:
                yield from _imports(child, name, lazy or function, typing)


def room(module: str) -> str:
    """The layer of a module: a package of pipeline/, `stages` or `cli`."""
    parts = module.split(".")
    if parts[0] != "pipeline":
        return "stages" if parts[0] == "stages" else "cli"
    return parts[1] if len(parts) > 1 else "runtime"  # pipeline/__init__.py is below all of them


def members() -> set[str]:
    """Modules that a registry names: the members of the plug-in families."""
    return {
        bare(place.partition(":")[0])
        for registries in REGISTRIES.values()
        for registry in registries
        for place in registry.entries.values()
    }


def forbidden(importer: str, imported: str) -> str:
    """The reason why one of our modules may not import another; "" if it may."""
    here, there = room(importer), room(imported)
    if imported in ("pipeline", "stages", PACKAGE):
        return ""
    if imported in members() and importer != imported:
        return "a member of a family is imported by nobody; its registry builds it"
    if here == there == "stages" and importer != imported:
        of_command = importer in COMMANDS_OF_COMMANDS or FLAGS_OF_A_COMMAND.get(importer) == imported
        return "" if of_command else "a stage imports a stage"
    if here != there and LAYERS[there] >= LAYERS[here]:
        return f"{here} imports {there}, which does not come before it"
    return ""


def our(module: str) -> bool:
    return module.split(".")[0] in ("cli", "stages", "pipeline", PACKAGE)


def at(name: str, line: int) -> str:
    return f"{FILES[name].relative_to(ROOT)}:{line}"


# ---------------------------------------------------------------- the tests


def test_a_package_imports_the_ones_before_it_and_nobody_imports_a_member_of_a_family() -> None:
    broken = [
        f"{at(name, found.line)} imports {found.module}: {why}"
        for name in FILES
        for found in imports(name)
        if our(found.module) and (why := forbidden(name, found.module))
    ]
    assert not broken, "\n".join(broken)


def test_our_modules_are_imported_by_the_one_name_of_the_package() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} imports {name}"
        for path in sources("pipeline", "stages", "tests", "benchmarks")
        if path != ROOT / "tests" / "version1" / "make.py"  # it runs the code of version 1
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in names_imported(node)
        if name.partition(".")[0] in ("cli", "pipeline", "stages")
    ]
    assert not wrong, "\n".join(wrong)


def names_imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def test_every_package_of_the_library_has_its_place_in_the_order_and_says_what_it_is_for() -> None:
    for path in (ROOT / "pipeline").glob("*/__init__.py"):
        assert path.parent.name in LAYERS, f"{path.parent.name} is not in ORDER above"
        assert ast.get_docstring(TREES[module_of(path)]), f"{path} does not say what the package is for"


def test_no_loose_file_lies_in_the_library() -> None:
    assert {path.name for path in (ROOT / "pipeline").glob("*.py")} == {"__init__.py"}


def test_the_files_of_the_library_import_each_other_without_a_circle() -> None:
    below = {
        name: {found.module for found in imports(name) if found.module in FILES and not found.typing}
        for name in FILES
        if room(name) not in ("stages", "cli") and FILES[name].name != "__init__.py"
    }
    below = {name: {m for m in modules if m in below} for name, modules in below.items()}
    while free := [name for name in below if not below[name] or not any(name in m for m in below.values())]:
        for name in free:
            del below[name]
        for modules in below.values():
            modules.difference_update(free)
    assert not below, f"a circle of imports among {sorted(below)}"


def test_each_third_party_package_has_its_home() -> None:
    strays = []
    for name, path in FILES.items():
        where = path.relative_to(ROOT).as_posix()
        for found in imports(name):
            homes = HOMES.get(found.module.split(".")[0])
            if homes and not any(where.startswith(h) if h.endswith("/") else where == h for h in homes):
                strays.append(f"{at(name, found.line)} imports {found.module}; its home is {', '.join(sorted(homes))}")
    assert not strays, "\n".join(strays)


def test_no_module_has_a_name_without_meaning() -> None:
    paths = [path.relative_to(ROOT) for path in sources("pipeline", "stages", "tests", "benchmarks")]
    bad = [str(path) for path in paths if NAMES_OF_NOTHING & {*path.parts, path.stem}]
    assert not bad


def light() -> list[str]:
    packages = {name for name, path in FILES.items() if path.name == "__init__.py"}
    return [name for name in FILES if name in LIGHT | packages or (name.startswith("stages") and "stages.*" in LIGHT)]


@pytest.mark.parametrize("start", light())
def test_loading_a_light_file_loads_no_heavy_package(start: str) -> None:
    way, todo = {start: start}, [start]
    while todo:
        name = todo.pop()
        for found in imports(name):
            if found.lazy or found.typing:
                continue
            heavy = found.module.split(".")[0] in HEAVY
            assert not heavy, f"{way[name]} imports {found.module} at {at(name, found.line)}; import it later"
            parts = found.module.split(".")
            for module in (".".join(parts[: n + 1]) for n in range(len(parts))):  # a package's __init__ runs first
                if module in FILES and module not in way:
                    way[module] = f"{way[name]} -> {module}"
                    todo.append(module)


def test_help_is_printed_without_any_heavy_package() -> None:
    if "cli" not in FILES:
        pytest.skip("cli.py is not there yet")
    program = (
        "import sys; sys.argv = ['compress', '--help']; from compress_ssl import cli\n"
        "try: cli.main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        f"loaded = sorted(set(sys.modules) & {HEAVY!r}); assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "distill" in done.stdout


REFUSED = {
    "an output that no model has": "export-teacher --data digits --teacher convnet --out x --keep nothing",
    "a missing data folder": "export-teacher --data folder:/nowhere --teacher convnet --out x",
    "an unknown teacher": "export-teacher --data digits --teacher nothing --out x",
    "contradicting flags": "export-teacher --data digits --teacher convnet --out x --policy none --views 3",
    "an unknown student": "distill --store x --student nothing --method seed --out y",
    "an unknown method": "distill --store x --student convnet --method nothing --out y",
    "a store that is not there": "distill --store x --student convnet --method seed --out y",
    "an unknown protocol": "evaluate --run x --val digits --protocol nothing",
    "a run that is not there": "evaluate --run x --val digits",
    "a store to check that is not there": "verify x",
}


@pytest.mark.parametrize("words", REFUSED.values(), ids=REFUSED)
def test_what_can_be_refused_without_torch_is_refused_without_it(words: str, tmp_path: Path) -> None:
    program = (
        f"import sys; sys.argv = ['compress', *{words.split()!r}]; from compress_ssl import cli\n"
        "try: cli.main()\n"
        "except SystemExit as stop: assert stop.code == 2, stop.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("error: ") == 1


def at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that are executed when a module is imported, class bodies and branches included."""
    for statement in body:
        if guarded(statement):
            continue
        yield statement
        if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            for inner in ("body", "orelse", "finalbody"):
                yield from at_import(getattr(statement, inner, []))
            for handler in getattr(statement, "handlers", []):
                yield from at_import(handler.body)


def evaluated(statement: ast.stmt) -> Iterator[ast.AST]:
    """The expressions that a statement evaluates at import: defaults and decorators, not bodies or annotations."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
        arguments = statement.args
        todo: list[ast.AST] = [*statement.decorator_list, *arguments.defaults, *filter(None, arguments.kw_defaults)]
    else:
        todo = [node for node in ast.iter_child_nodes(statement) if not isinstance(node, ast.stmt | ast.ExceptHandler)]
    while todo:
        node = todo.pop()
        yield node
        if not isinstance(node, ast.Lambda):
            todo.extend(ast.iter_child_nodes(node))


def import_side_effects(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """[(line, action)] of a module's actions at import that change state outside it."""
    for statement in at_import(tree.body):
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            yield statement.lineno, f"calls {ast.unparse(statement.value.func)}() for its effect"
        if isinstance(statement, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Delete):
            targets = statement.targets if isinstance(statement, ast.Assign | ast.Delete) else [statement.target]
            for target in targets:
                if isinstance(target, ast.Attribute | ast.Subscript):
                    yield statement.lineno, f"changes {ast.unparse(target)}"
        for node in evaluated(statement):
            if dotted(node) in GLOBAL_STATE:
                yield statement.lineno, f"touches {dotted(node)}"


@pytest.mark.parametrize("name", sorted(FILES))
def test_importing_does_nothing(name: str) -> None:
    done = [f"{at(name, line)} {what}" for line, what in import_side_effects(TREES[name])]
    assert not done, "\n".join(done)


STATE = """
import locale, logging, os, random, signal, socket, sys, threading, warnings, multiprocessing
import dask, faiss, matplotlib, numpy, PIL.Image, torch, zarr

def state():
    umask = os.umask(0o22)
    os.umask(umask)
    cudnn = [getattr(torch.backends.cudnn, name) for name in ("benchmark", "deterministic", "enabled", "allow_tf32")]
    return dict(
        environ=dict(os.environ), cwd=os.getcwd(), umask=umask, path=list(sys.path), hooks=[sys.excepthook],
        signals=[signal.getsignal(s) for s in signal.valid_signals()], warnings=list(warnings.filters),
        threads=threading.active_count(), locale=locale.setlocale(locale.LC_ALL), timeout=socket.getdefaulttimeout(),
        start=multiprocessing.get_start_method(allow_none=True), recursion=sys.getrecursionlimit(),
        logging=[(logging.root.level, list(logging.root.handlers))], random=random.getstate(),
        numpy=str(numpy.random.get_state()), errors=numpy.geterr(), rng=torch.get_rng_state().tolist(),
        computing=torch.get_num_threads(), dtype=torch.get_default_dtype(), device=torch.get_default_device(),
        algorithms=torch.are_deterministic_algorithms_enabled(), matmul=torch.get_float32_matmul_precision(),
        grad=torch.is_grad_enabled(), sharing=torch.multiprocessing.get_sharing_strategy(), cudnn=cudnn,
        faiss=faiss.omp_get_max_threads(), rc=dict(matplotlib.rcParams),
        dask=repr(dask.config.config), zarr=repr(zarr.config.config), pixels=PIL.Image.MAX_IMAGE_PIXELS,
    )
"""
"""What no import may change, as it can be seen from Python."""


def test_importing_everything_changes_no_global_state() -> None:
    theirs = sorted({f.module for name in FILES for f in imports(name) if not our(f.module) and not f.typing})
    program = f"""{STATE}
import contextlib, importlib
for name in {theirs!r}:
    with contextlib.suppress(ImportError):  # of an extra, or a name in a package
        importlib.import_module(name)
before = state()
for name in {sorted(FILES)!r}:
    importlib.import_module(name)
after = state()
changed = [name for name in before if before[name] != after[name]]
assert not changed, changed
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


REGISTRIES = {
    f"pipeline.{path.parent.name}": [
        value
        for value in vars(importlib.import_module(f"{PACKAGE}.pipeline.{path.parent.name}")).values()
        if isinstance(value, Registry)
    ]
    for path in sorted((ROOT / "pipeline").glob("*/__init__.py"))
}


@pytest.mark.parametrize(
    ("registry", "kind"),
    [
        pytest.param(registry, kind, id=f"{registry.family}-{kind}")
        for registries in REGISTRIES.values()
        for registry in registries
        for kind in registry.entries
    ],
)
def test_every_entry_of_every_registry_can_be_imported(registry: Registry, kind: str) -> None:
    try:
        entry = registry.resolve(kind)
    except UserError as problem:
        if isinstance(problem.__cause__, ModuleNotFoundError):
            pytest.skip(str(problem))
        raise
    assert callable(entry)
    assert registry.summary(kind), f"{registry.entries[kind]} has no docstring for the registry to show"


# ---------------------------------------------------------------- the rules find violations


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("cli", "stages.distill", True),
        ("stages.distill", "pipeline.methods", True),
        ("stages.distill", "pipeline.methods.base", True),
        ("stages.distill", "pipeline.methods.seed", False),
        ("stages.distill", "stages.evaluate", False),
        ("stages.demo", "stages.evaluate", True),
        ("stages.sweep", "stages.distill", True),
        ("stages.distill", "cli", False),
        ("pipeline.methods.seed", "pipeline.methods.base", True),
        ("pipeline.methods.seed", "pipeline.methods.memory_bank", True),
        ("pipeline.methods.seed", "pipeline.models.embedder", True),
        ("pipeline.methods.seed", "pipeline.models.timm", False),
        ("pipeline.methods.seed", "pipeline.extraction.embed", False),
        ("pipeline.methods.seed", "pipeline.evaluators.base", False),
        ("pipeline.store.feature_store", "pipeline.runtime.storage", True),
        ("pipeline.store.feature_store", "pipeline.store.shards", True),
        ("pipeline.store.feature_store", "pipeline.models.embedder", False),
        ("pipeline.runtime.storage", "pipeline.store.feature_store", False),
        ("pipeline.training.sampler", "pipeline.methods.base", True),
        ("pipeline.training.sampler", "pipeline.evaluators.base", False),
        ("pipeline.training.sampler", "stages.distill", False),
    ],
)
def test_the_import_rule_accepts_good_and_rejects_bad_imports(importer: str, imported: str, allowed: bool) -> None:
    assert (forbidden(importer, imported) == "") is allowed


@pytest.mark.parametrize(
    ("text", "does"),
    [
        ("torch.manual_seed(0)", True),
        ("os.environ['OMP_NUM_THREADS'] = '1'", True),
        ("THREADS = os.environ.get('THREADS')", True),
        ("if os.getenv('A'):\n    B = 1", True),
        ("def f(x=os.getenv('A')): ...", True),
        ("torch.backends.cudnn.benchmark = True", True),
        ("_ = warnings.simplefilter('ignore')", True),
        ("class C:\n    signal.signal(1, None)", True),
        ("try:\n    pass\nexcept OSError:\n    sys.path.append('x')", True),
        ("if __name__ == '__main__':\n    main()", False),
        ("def f():\n    torch.manual_seed(0)", False),
        ("TABLE = dict(a=1)\n@dataclass(frozen=True)\nclass C:\n    x: int = field(default=1)", False),
        ('"""A docstring."""\nPATTERN = re.compile("x")', False),
    ],
)
def test_the_rule_of_importing_distinguishes_actions_from_definitions(text: str, does: bool) -> None:
    assert bool(list(import_side_effects(ast.parse(text)))) is does
