"""Module names of the first version, in specs and in users' own files, lead to where things are now."""

import sys
from pathlib import Path

import pytest

from compress_ssl.pipeline.methods.base import Method
from compress_ssl.pipeline.runtime import old_names
from compress_ssl.pipeline.runtime.artifact import UserError
from compress_ssl.pipeline.runtime.import_object import load

PLACES = {"pipeline", "stages", "cli"}
OWN = """
from pipeline import philox
from pipeline.bank import MemoryBank
from pipeline.labelhead import LabelHead
from pipeline.method import Batch, Method, Needs, Recipe, Setting
from pipeline.similarity import relation_kl

class Mine(Method):
    recipe = Recipe(lr=0.7)
    needs = Needs(views=2)
    def forward(self, batch, outputs):
        return [out["embedding"].mean() for out in outputs]
"""


def ours_loaded() -> set[str]:
    return {name for name in sys.modules if name.partition(".")[0] in PLACES}


def test_a_spec_of_an_old_manifest_finds_the_module_in_its_new_place_and_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = load("pipeline.teachers.digits:Pixels")
    assert found.__module__.startswith("compress_ssl.pipeline.")
    assert "warning: the module pipeline.teachers.digits is called compress_ssl.pipeline." in capsys.readouterr().err


def test_a_users_own_method_may_import_by_the_old_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.py").write_text(OWN)
    mine = load(f"{tmp_path / 'own.py'}:Mine")
    assert issubclass(mine, Method) and mine.recipe.lr == 0.7
    assert "warning: the module pipeline.method is called compress_ssl.pipeline." in capsys.readouterr().err


def test_the_old_names_are_there_only_while_a_users_module_is_imported(tmp_path: Path) -> None:
    finders = list(sys.meta_path)
    (tmp_path / "own.py").write_text(OWN)
    load(f"{tmp_path / 'own.py'}:Mine")
    assert sys.meta_path == finders and not ours_loaded()


def test_a_users_own_package_of_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").write_text("HERE = 'the user'\n")
    (tmp_path / "pipeline" / "nets.py").write_text("def net():\n    return 'own'\n")
    (tmp_path / "own.py").write_text("import pipeline\nassert pipeline.HERE\ndef f():\n    return pipeline.HERE\n")
    (tmp_path / "old.py").write_text("from pipeline.method import Method\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert load("pipeline.nets:net")() == "own"
        assert load("own.py:f")() == "the user"
        assert load("pipeline.teachers.digits:Pixels").__module__.startswith(
            "compress_ssl."
        )  # they have no such module
        with pytest.raises(UserError, match=r"pipeline\.method"):
            load("old.py:Method")
    finally:
        for name in ours_loaded():
            del sys.modules[name]


@pytest.mark.parametrize("name", ["pipeline.nowhere", "stages.nothing", "torch.nn"])
def test_a_name_that_never_was_ours_has_no_new_place(name: str) -> None:
    assert old_names.new_name(name) is None
