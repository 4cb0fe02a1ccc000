"""pyproject.toml, constraints.txt, environment.yml, the Makefile and the installed packages agree."""

import ast
import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAME = canonicalize_name(PROJECT["name"])

CONDA_NAMES = {"torch": ["pytorch-gpu"], "dask": ["dask", "distributed"], "faiss-cpu": []}
"""pip's name: conda's names, where they differ. faiss-cpu: the environment is for a GPU."""

LATER_IN_CONDA = {"faiss-gpu"}
"""Floors that conda's channels cannot meet yet."""


def requirements() -> list[Requirement]:
    """Every dependency pyproject.toml names, those of the extras too, this project's own extras aside."""
    lines = [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]
    return [r for r in map(Requirement, lines) if canonicalize_name(r.name) != NAME]


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line and not line.startswith("#")]
    bad = [row for row in rows if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", row)]
    assert not bad, f"not of the form name==version: {bad}"
    names = [row.partition("==")[0] for row in rows]
    assert names == sorted(set(names)), "the names are not sorted, or one stands twice"
    return {name: Version(version) for name, _, version in (row.partition("==") for row in rows)}


def conda() -> tuple[dict[str, Requirement], list[str]]:
    """(conda's packages by name, the lines for pip) of environment.yml."""
    listed = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    packages = [Requirement(line) for line in listed if isinstance(line, str)]
    assert isinstance(listed[-1], dict), "environment.yml does not end with its pip section"
    return {canonicalize_name(p.name): p for p in packages}, listed[-1]["pip"]


def installed(name: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def in_conda() -> bool:
    return (Path(sys.prefix) / "conda-meta").is_dir()


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_every_dependency_is_pinned_at_a_version_it_allows(requirement: Requirement) -> None:
    pin = pins().get(canonicalize_name(requirement.name))
    assert pin is not None, f"{requirement.name} is not in constraints.txt"
    assert pin in requirement.specifier


def imported(*files: Path) -> set[str]:
    """Top-level names that files import, anywhere in them."""
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    parts = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.split(".")[0] for name in plain | parts}


def declares(lines: list[str]) -> set[str]:
    """The names dependencies declare; `dask[distributed]` declares distributed too."""
    asked = [Requirement(line) for line in lines]
    return {canonicalize_name(name) for r in asked for name in (r.name, *r.extras)}


def test_every_package_that_is_imported_is_a_dependency() -> None:
    if in_conda():
        pytest.skip("conda names its packages otherwise")
    project = [ROOT / "cli.py", *(ROOT / "pipeline").rglob("*.py"), *(ROOT / "stages").rglob("*.py")]
    tests = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    homes = importlib.metadata.packages_distributions()
    extras = PROJECT["optional-dependencies"]
    run = declares(PROJECT["dependencies"] + extras["efficientnet-lite"])
    dev = run | declares(extras["dev"])
    for files, declared in ((project, run), (tests, dev)):
        names = imported(*(path for path in files if path.exists())) & set(homes)
        undeclared = [n for n in names if not {canonicalize_name(d) for d in homes[n]} & (declared | {NAME})]
        assert not undeclared, f"imported, but not in pyproject.toml: {sorted(undeclared)}"


def test_every_package_that_gets_installed_is_pinned() -> None:
    if in_conda():
        pytest.skip("conda chose the versions here")
    known, seen, missing = pins(), set[tuple[str, str]](), set[str]()
    todo = [(r, "") for r in requirements()]
    while todo:
        requirement, asked_by = todo.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": asked_by}):
            continue
        if name not in known and not re.match(r"(nvidia|cuda)-", name):
            missing.add(name)
        for extra in ("", *requirement.extras):
            if (name, extra) not in seen and (there := installed(name)):
                seen.add((name, extra))
                todo += [(Requirement(line), extra) for line in there.requires or []]
    assert not missing, f"not in constraints.txt: {sorted(missing)}"


def test_the_installed_versions_are_the_pinned_ones() -> None:
    if in_conda():
        pytest.skip("conda chose the versions here")
    other = {
        name: f"{there.version}, pinned {pin}"
        for name, pin in pins().items()
        if (there := installed(name)) and Version(there.version).public != pin.public
    }
    assert not other, f"installed otherwise than pinned: {other}; `make install` mends it"


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_every_dependency_is_in_the_conda_environment(requirement: Requirement) -> None:
    packages, for_pip = conda()
    name = canonicalize_name(requirement.name)
    if name in {canonicalize_name(Requirement(line).name) for line in for_pip if not line.startswith("-")}:
        return
    for there in CONDA_NAMES.get(name, [name]):
        assert there in packages, f"{there} is not in environment.yml"
        if there not in LATER_IN_CONDA:
            assert packages[there].specifier == requirement.specifier, f"{there} has another floor in environment.yml"


def test_the_conda_environment_installs_this_checkout_last_and_names_no_host() -> None:
    packages, for_pip = conda()
    assert for_pip[-1] == "-e ."
    assert packages["python"].specifier == Requirement(f"python{PROJECT['requires-python']}").specifier
    assert "://" not in (ROOT / "environment.yml").read_text(encoding="utf-8")


def test_the_console_script_leads_to_a_function() -> None:
    module, _, name = PROJECT["scripts"]["compress"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_the_installed_command_is_the_one_of_pyproject() -> None:
    there = installed(NAME)
    assert there is not None, f"{NAME} is not installed here; `make install` does it"
    scripts = {entry.name: entry.value for entry in there.entry_points if entry.group == "console_scripts"}
    assert scripts == PROJECT["scripts"]
    assert there.version == PROJECT["version"]


def test_the_package_loads_from_this_checkout_beside_a_users_own_cli_pipeline_and_stages(tmp_path: Path) -> None:
    for name in ("cli.py", "pipeline/__init__.py", "stages/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise ImportError('this is the user's own')\n")
    program = (
        "from compress_ssl import cli, pipeline, stages, distill\n"
        "print(cli.__file__, pipeline.__file__, stages.__file__, sep='\\n')"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, f"{done.stderr}\n`make install` installs this checkout"
    wanted = [ROOT / "cli.py", ROOT / "pipeline" / "__init__.py", ROOT / "stages" / "__init__.py"]
    assert [Path(line).resolve() for line in done.stdout.split("\n") if line] == wanted


# ---------------------------------------------------------------- the wheel, and lint in another folder


def packages() -> dict[str, Path]:
    """{name below the one import name: folder} of all packages in the tree."""
    folders = [ROOT, *(ROOT / top for top in ("pipeline", "stages"))]
    folders += [path.parent for top in ("pipeline", "stages") for path in (ROOT / top).rglob("*/__init__.py")]
    return {".".join(["compress_ssl", *folder.relative_to(ROOT).parts]): folder for folder in dict.fromkeys(folders)}


def tracked() -> list[str]:
    """Files of this checkout that belong to it: those that git knows or would add."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in names if (ROOT / name).is_file()]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of this checkout, in a folder whose name is no Python name."""
    for name in tracked():
        target = tmp_path / "a-clone" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    return tmp_path / "a-clone"


def test_the_packages_of_pyproject_are_those_of_the_tree() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(packages())


def test_settings_that_name_our_modules_name_modules_that_exist() -> None:
    """A tool passes over a name that leads nowhere without a word."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    for place in tools["ruff"]["lint"]["flake8-bugbear"]["extend-immutable-calls"]:
        module, _, name = place.rpartition(".")
        assert callable(getattr(importlib.import_module(module), name)), place
    assert tools["ruff"]["lint"]["isort"]["known-first-party"] == ["compress_ssl"]
    for package, patterns in tools["setuptools"]["package-data"].items():
        for pattern in patterns:
            assert list(packages()[package].glob(pattern)), f"{package}: {pattern}"
    filters = [line.split(":") for line in tools["pytest"]["ini_options"]["filterwarnings"]]
    for action, _, category, module in filters:
        assert action == "error" and category.endswith("Warning")
        for name in ("compress_ssl.cli", "compress_ssl.pipeline.store.layout", "compress_ssl.stages.distill"):
            assert re.match(module, name), f"{module} does not match {name}"
    assert "ignore_missing_imports" not in tools["mypy"]
    for override in tools["mypy"]["overrides"]:
        assert not [name for name in override["module"] if name.startswith("compress_ssl")]


def test_every_public_name_can_be_imported() -> None:
    import compress_ssl

    for name in compress_ssl.__all__:
        assert getattr(compress_ssl, name) is not None
        assert name in dir(compress_ssl)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = compress_ssl.nothing


def test_a_line_of_a_page_has_at_most_120_characters_unless_it_is_of_a_table() -> None:
    long = [
        f"{page.relative_to(ROOT)}:{number}"
        for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 120 and not line.startswith("|")
    ]
    assert not long


@pytest.mark.extended
def test_the_wheel_holds_the_packages_alone_and_runs_beside_a_users_own_names(clone: Path, tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(clone)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    data = (".safetensors", ".html", ".css")
    wanted = {f"compress_ssl/{name}.py" for name in ("__init__", "__main__", "cli")}  # a stray file beside them is not
    wanted |= {
        f"{name.replace('.', '/')}/{file.name}"
        for name, folder in packages().items()
        for file in folder.glob("*.py")
        if folder != ROOT
    }
    wanted |= {f"compress_ssl/{name}" for name in tracked() if name.startswith("pipeline/") and name.endswith(data)}
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == wanted

    home = tmp_path / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    python, here = home / "bin" / "python", Path(zipfile.__file__).parent
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", str(wheel)]
    subprocess.run(install, check=True, timeout=300)
    (site,) = (home / "lib").glob("python*/site-packages")
    ours = Path(importlib.metadata.distribution("torch").locate_file("")).resolve()
    assert ours != here
    (site / "dependencies.pth").write_text(f"{ours}\n")  # an editable install there does not follow: it is a hook

    user = tmp_path / "user"
    for name in ("cli.py", "pipeline/__init__.py", "stages/__init__.py"):
        (user / name).parent.mkdir(parents=True, exist_ok=True)
        (user / name).write_text("raise ImportError('this is the user's own')\n")
    words = "export-teacher --data digits --teacher digits-teacher --limit 40 --views 2 --out store --device cpu"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for command in ([str(home / "bin" / "compress")], [str(python), "-m", "compress_ssl"]):
        done = subprocess.run(
            [*command, *words.split()], cwd=user, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    assert "complete already" in done.stdout
    code = "import compress_ssl; print(compress_ssl.__file__)"
    found = subprocess.run([str(python), "-c", code], cwd=user, env=environment, capture_output=True, text=True)
    assert Path(found.stdout.strip()).is_relative_to(home)


@pytest.mark.extended
def test_lint_sees_a_type_error_across_modules_in_a_clone_of_another_name(clone: Path) -> None:
    check = ["make", "types", f"VENV={sys.prefix}"]
    clean = subprocess.run(check, cwd=clone, capture_output=True, text=True, timeout=600)
    assert clean.returncode == 0, clean.stdout
    with open(clone / "stages" / "compare.py", "a") as file:
        file.write("\nfrom compress_ssl.pipeline.runtime.errors import UserError\n\nNUMBER: int = UserError('no')\n")
    broken = subprocess.run(check, cwd=clone, capture_output=True, text=True, timeout=600)
    assert broken.returncode != 0 and "NUMBER" not in broken.stderr
    assert 'expression has type "UserError", variable has type "int"' in broken.stdout, broken.stdout


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`make install` in a folder that holds our Makefile and pins, with a Python that notes what it is asked."""
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON")}
    return subprocess.run(
        ["make", "install", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )


PRETENDER = """#!/bin/sh
case "$*" in
*"-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo venv >> asked;;
*"-m pip install"*) echo pip >> asked; exit 0;;
esac
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    if not shutil.which("make"):
        pytest.skip("there is no make here")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "pretender").write_text(PRETENDER)
    (tmp_path / "pretender").chmod(0o755)
    return tmp_path


def asked(folder: Path) -> list[str]:
    return (folder / "asked").read_text().split()


def test_make_installs_once_and_again_only_when_the_pins_differ(folder: Path) -> None:
    assert make(folder, "PYTHON=./pretender").returncode == 0
    assert asked(folder) == ["venv", "pip"]
    for name in ("pyproject.toml", "constraints.txt", "Makefile"):
        (folder / name).touch()
    again = make(folder, "PYTHON=./pretender")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert asked(folder) == ["venv", "pip"]
    with open(folder / "constraints.txt", "a") as file:
        file.write("zzz==1\n")
    assert make(folder, "PYTHON=./pretender").returncode == 0
    assert asked(folder) == ["venv", "pip", "pip"]


def test_make_repeats_an_install_that_failed(folder: Path) -> None:
    (folder / "pretender").write_text(PRETENDER.replace("exit 0", "exit 1"))
    assert make(folder, "PYTHON=./pretender").returncode != 0
    (folder / ".venv/bin/python").write_text(PRETENDER)
    assert make(folder, "PYTHON=./pretender").returncode == 0
    assert asked(folder) == ["venv", "pip", "pip"]


def test_make_refuses_a_python_that_is_missing_old_or_without_venv(folder: Path) -> None:
    (folder / "old").write_text('#!/bin/sh\ncase "$*" in\n-V) echo Python 3.9.1;;\n*version_info*) exit 1;;\nesac\n')
    (folder / "bare").write_text('#!/bin/sh\ncase "$*" in\n*ensurepip*) exit 1;;\nesac\n')
    for name in ("old", "bare"):
        (folder / name).chmod(0o755)
    for python, words in (
        ("./absent", "there is no ./absent here"),
        ("./old", "./old is Python 3.9.1, Python 3.11 or newer is needed"),
        ("./bare", "./bare lacks its venv module"),
    ):
        refused = make(folder, f"PYTHON={python}")
        assert refused.returncode != 0
        assert f"error: {words}" in refused.stderr
        assert not (folder / ".venv").exists()
