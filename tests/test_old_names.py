"""Module names of the first version, in specs and in users' own files, are translated to the new names."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from compress_ssl.pipeline.methods import METHODS
from compress_ssl.pipeline.methods.base import Method, MethodContext
from compress_ssl.pipeline.models import build
from compress_ssl.pipeline.runtime import old_names
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.import_object import import_object

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
    def __init__(self, *, setting: Setting, strength: float = 1.0):
        super().__init__()
        self.strength, self.read = strength, []
        self.bank = MemoryBank(8, {"teacher": setting.teacher_width})
    def forward(self, batch, outputs):
        return [out["embedding"].mean() * self.strength for out in outputs]
    def delivers(self):
        return "a head"
    def fill(self, read):
        self.read.append(read)
        super().fill(read)
"""


@pytest.fixture(autouse=True)
def warn_again() -> None:
    """Each test sees the warnings, which are printed once in a process."""
    old_names._warn.cache_clear()


def ours_loaded() -> set[str]:
    return {name for name in sys.modules if name.partition(".")[0] in PLACES}


def test_an_old_spec_imports_the_moved_module_and_prints_a_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = import_object("pipeline.teachers.digits:Pixels")
    assert found.__module__.startswith("compress_ssl.pipeline.")
    assert "warning: the module pipeline.teachers.digits is called compress_ssl.pipeline." in capsys.readouterr().err


def test_a_users_own_method_can_import_by_old_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.py").write_text(OWN)
    mine = import_object(f"{tmp_path / 'own.py'}:Mine")
    assert issubclass(mine, Method) and mine.recipe.lr == 0.7
    context = MethodContext([], {"embedding": (5,)}, np.arange(9), 1, 0)
    made = METHODS.build(f"python:{tmp_path / 'own.py'}:Mine,strength=2", context=context)
    assert made.strength == 2.0 and made.exported_head() == "a head"
    made.refill_banks(None)
    assert made.read == [None]
    assert "warning: the module pipeline.method is called compress_ssl.pipeline." in capsys.readouterr().err


SUBCLASSES = """
from pipeline.method import Method
from pipeline.methods.seed import Seed

class Small(Seed):
    def __init__(self, *, setting, bank: int = 20):
        super().__init__(setting=setting, bank=bank)
        self.regions = setting.students[0].equip(("embedding",))
    def delivers(self):
        return "a head"

class Anything(Method):
    def __init__(self, **options):
        super().__init__()
        self.context, self.power = options["setting"], options["power"]
    def forward(self, batch, outputs):
        return [out["embedding"].mean() for out in outputs]
"""


def test_a_users_subclass_of_a_built_in_method_and_one_that_takes_any_key_get_their_setting(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(SUBCLASSES)
    context = MethodContext([build("convnet:channels=4+5,size=8")], {"embedding": (5,)}, np.arange(90), 1, 0)
    small = METHODS.build(f"python:{tmp_path / 'own.py'}:Small,bank=30", context=context)
    assert small.exported_head() == "a head" and small.recipe.epochs == 200
    anything = METHODS.build(f"python:{tmp_path / 'own.py'}:Anything,power=2", context=context)
    assert anything.context is context and anything.power == 2


def test_a_model_has_the_same_name_in_manifests_by_its_old_and_its_new_spec() -> None:
    modules = ("pipeline.teachers.digits", "compress_ssl.pipeline.models.networks.digits")
    assert {build(f"python:{module}:Pixels").name for module in modules} == {"python-pipeline.teachers.digits-Pixels"}


def test_old_names_can_be_imported_only_while_a_users_module_is_imported(tmp_path: Path) -> None:
    finders = list(sys.meta_path)
    (tmp_path / "own.py").write_text(OWN)
    import_object(f"{tmp_path / 'own.py'}:Mine")
    assert sys.meta_path == finders and not ours_loaded()


def test_a_users_own_package_of_an_old_name_takes_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").write_text("HERE = 'the user'\n")
    (tmp_path / "pipeline" / "nets.py").write_text("def net():\n    return 'own'\n")
    (tmp_path / "own.py").write_text("import pipeline\nassert pipeline.HERE\ndef f():\n    return pipeline.HERE\n")
    (tmp_path / "old.py").write_text("from pipeline.method import Method\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert import_object("pipeline.nets:net")() == "own"
        assert import_object("own.py:f")() == "the user"
        assert import_object("pipeline.teachers.digits:Pixels").__module__.startswith(
            "compress_ssl."
        )  # the user's package has no such module
        with pytest.raises(UserError, match=r"pipeline\.method"):
            import_object("old.py:Method")
    finally:
        for name in ours_loaded():
            del sys.modules[name]


def test_every_new_name_in_the_tables_exists() -> None:
    for old, new in old_names.MOVED.items():
        assert importlib.import_module(new), old
    for module, names in old_names.RENAMED.items():
        for old, new in names.items():
            place, _, name = new.rpartition(":")
            where = importlib.import_module(place or str(old_names.new_name(module)))
            assert hasattr(where, name), f"{module}.{old} leads to {new}, which does not exist"


@pytest.mark.parametrize("name", ["pipeline.nowhere", "stages.nothing", "torch.nn"])
def test_a_name_unknown_to_the_first_version_has_no_new_name(name: str) -> None:
    assert old_names.new_name(name) is None
