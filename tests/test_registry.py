"""Specs `kind:argument,key=value` are parsed, checked and built; errors name the fault and suggest a remedy."""

import inspect
import json
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress_ssl.pipeline.runtime.digests import canonical
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.import_object import import_object
from compress_ssl.pipeline.runtime.options import from_option, recordable
from compress_ssl.pipeline.runtime.registry import Registry
from compress_ssl.pipeline.runtime.signatures import convert, literal
from compress_ssl.pipeline.runtime.spec import Spec, did_you_mean, parse
from compress_ssl.pipeline.runtime.user_object import from_entry_point


class Thing:
    """An object that records the arguments it was built with."""

    def __init__(self, *given: Any, **options: Any):
        self.given, self.options = given, options


def lamp(
    name: str = "plain",
    /,
    *,
    watts: int = 60,
    bright: float = 0.5,
    on: bool = True,
    colour: Literal["red", "green"] = "red",
    sizes: tuple[int, ...] = (),
    shade: str | None = "paper",
    file: Path = Path("."),
    room: str = "",
) -> Thing:
    """A lamp for tests.

    More about it.
    """
    return Thing(name, watts=watts, bright=bright, on=on, colour=colour, sizes=sizes, shade=shade, file=file, room=room)


def needs(where: Path, /, *, height: int) -> Thing:
    """Needs both."""
    return Thing(where, height=height)


def anything(**options: Any) -> Thing:
    return Thing(**options)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setitem(sys.modules, "made_up_things", sys.modules[__name__])
    table = {name: f"made_up_things:{name}" for name in ("lamp", "needs", "anything")}
    return Registry("thing", {**table, "absent": "no_such_package_anywhere:Thing"}, path_means="needs")


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("digits", Spec("digits")),
        ("digits:split=test", Spec("digits", "", {"split": "test"})),
        ("timm:vit,pretrained=true,drop-rate=0.1", Spec("timm", "vit", {"pretrained": "true", "drop_rate": "0.1"})),
        ("folder:/a,b/c=d,labels=false", Spec("folder", "/a,b/c=d", {"labels": "false"})),
        ("python:my.module:factory,x=1", Spec("python", "my.module:factory", {"x": "1"})),
        ("timm:hf-hub:timm/x.y,weights=/a=b", Spec("timm", "hf-hub:timm/x.y", {"weights": "/a=b"})),
        ("weights:,key=", Spec("weights", "", {"key": ""})),
    ],
)  # fmt: skip
def test_a_spec_is_kind_argument_and_options(text: str, spec: Spec) -> None:
    assert parse(text) == spec


WORD = st.from_regex(r"[A-Za-z_][A-Za-z_0-9]{0,5}", fullmatch=True)
VALUE = st.text(st.characters(exclude_characters=",=", exclude_categories=["Cs"]), max_size=6)


@given(WORD, VALUE.filter(lambda v: not v.startswith(":")), st.dictionaries(WORD, VALUE, max_size=3))
def test_a_spec_is_unchanged_after_writing_and_parsing(kind: str, argument: str, options: dict[str, str]) -> None:
    spec = Spec(kind, argument, options)
    assert parse(str(spec)) == spec


def test_a_key_given_twice_is_refused() -> None:
    with pytest.raises(UserError, match="gives a= twice; keep one"):
        parse("x:a=1,a=2")


# ---------------------------------------------------------------- ordering


def test_values_are_converted_to_the_parameters_type(registry: Registry) -> None:
    made = registry.build("lamp:tall,watts=40,bright=0.1,on=no,colour=green,sizes=3+5+7,shade=none,file=~/x")
    assert made.given == ("tall",)
    wanted = {"watts": 40, "bright": 0.1, "on": False, "colour": "green", "sizes": (3, 5, 7), "shade": None, "room": ""}
    assert made.options == {**wanted, "file": Path("~/x").expanduser()}
    assert [type(made.options[key]) for key in ("watts", "bright", "on")] == [int, float, bool]


def test_keys_that_are_not_given_keep_their_defaults(registry: Registry) -> None:
    assert registry.build("lamp").given == ("plain",)
    assert registry.build("lamp").options["watts"] == 60


def test_arguments_from_the_caller_are_no_keys_for_users(registry: Registry) -> None:
    assert registry.build("lamp", room="kitchen").options["room"] == "kitchen"
    with pytest.raises(UserError, match="has no key 'room'"):
        registry.build("lamp:room=hall", room="kitchen")


def test_a_member_with_arbitrary_keys_gets_literals(registry: Registry) -> None:
    made = registry.build("anything:a=1,b=0.5,c=true,d=none,e=text,f=1e-3")
    assert made.options == {"a": 1, "b": 0.5, "c": True, "d": None, "e": "text", "f": 0.001}
    assert literal("3+4") == "3+4"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lmap", "unknown thing 'lmap'...; did you mean 'lamp'? Known: lamp, needs, anything, absent"),
        ("zzzzz", "unknown thing 'zzzzz'.... Known: lamp, needs, anything, absent"),
        ("lamp:wats=3", "thing 'lamp' has no key 'wats'; did you mean 'watts'? Known: watts, bright, on, colour, "),
        ("lamp:watts=many", "lamp watts=many: must be a whole number"),
        ("lamp:watts=1.5", "lamp watts=1.5: must be a whole number"),
        ("lamp:bright=x", "lamp bright=x: must be a number"),
        ("lamp:on=maybe", "lamp on=maybe: must be true or false"),
        ("lamp:colour=blue", "lamp colour=blue: must be one of red, green"),
        ("lamp:sizes=1+b", "lamp sizes=1+b: must be a whole number"),
        ("needs:height=1", "thing 'needs' needs an argument: needs:WHERE"),
        ("needs:x", "thing 'needs' needs height="),
        ("anything:x", "thing 'anything' takes no argument, but 'x' was given"),
        ("absent", "thing 'absent' needs the package 'no_such_package_anywhere', which is not installed; pip install "),
    ],
)
def test_an_invalid_spec_raises_an_error_that_names_the_fault(registry: Registry, text: str, words: str) -> None:
    for ask in (registry.build, registry.check):
        with pytest.raises(UserError) as caught:
            ask(text)
        said = str(caught.value)
        assert all(part in said for part in words.split("..."))


def test_checking_builds_nothing(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(name: str = "", /, *, watts: int = 0) -> Thing:
        raise AssertionError

    monkeypatch.setattr(sys.modules[__name__], "lamp", never)
    assert registry.check("lamp:x,watts=3") == Spec("lamp", "x", {"watts": "3"})


def test_an_existing_path_alone_has_the_kind_path_means(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images,size=3").mkdir()
    assert registry.parse(str(tmp_path / "images,size=3")) == Spec("needs", str(tmp_path / "images,size=3"))
    for text in ("./gone", "/gone", "~/gone"):
        assert registry.parse(text) == Spec("needs", text)
    (tmp_path / "lamp").mkdir()
    monkeypatch.chdir(tmp_path)
    assert registry.parse("lamp") == Spec("lamp")  # a kind comes before a folder of the same name
    with pytest.raises(UserError, match="unknown thing 'gone'"):
        registry.parse("gone")


def test_an_import_error_in_our_own_module_is_not_reported_as_a_missing_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ModuleNotFoundError, match="compress_ssl.pipeline.nowhere"):
        Registry("thing", {"x": "compress_ssl.pipeline.nowhere:X"}).build("x")


def test_a_summary_is_the_first_line_of_the_docstring(registry: Registry) -> None:
    assert registry.summary("lamp") == "A lamp for tests."
    assert registry.summary("anything") == ""


def test_a_name_is_suggested_only_if_it_is_similar() -> None:
    assert did_you_mean("resnet81", ["resnet18", "vit"]) == "; did you mean 'resnet18'?"
    assert did_you_mean("zebra", ["resnet18", "vit"]) == ""


def test_a_registry_imports_a_module_only_when_a_spec_names_it() -> None:
    Registry("thing", {"x": "this_is:nowhere"}).parse("x")


def test_an_absolute_spec_names_the_same_object_from_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress_ssl.pipeline.datasets import DATASETS
    from compress_ssl.pipeline.models import MODELS

    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet18").mkdir()  # a folder named like a model is none
    (tmp_path / "own.py").write_text("from pathlib import Path\ndef net(width, table: Path = Path()): ...\n")
    for registry, text, settled in (
        (MODELS, "timm:resnet18,weights=w.pth", f"timm:resnet18,weights={tmp_path}/w.pth"),
        (MODELS, "torchscript:net.pt,size=32", f"torchscript:{tmp_path}/net.pt,size=32"),
        (MODELS, "python:own.py:net,width=3", f"python:{tmp_path}/own.py:net,width=3"),
        (MODELS, "python:own.py:net,table=a.csv", f"python:{tmp_path}/own.py:net,table={tmp_path}/a.csv"),
        (MODELS, "python:torch.nn:Flatten,start_dim=1", "python:torch.nn:Flatten,start_dim=1"),
        (DATASETS, "torchvision:CIFAR10,root=data", f"torchvision:CIFAR10,root={tmp_path}/data"),
        (DATASETS, "./resnet18", f"folder:{tmp_path}/resnet18"),
        (DATASETS, "digits:split=test", "digits:split=test"),
    ):
        assert registry.absolute_spec(text) == settled


@pytest.mark.parametrize("text", ["inf", "-inf", "nan"])
def test_an_option_that_is_not_finite_is_recorded_as_text_and_read_as_that_number_again(text: str) -> None:
    parameter = inspect.Parameter("x", inspect.Parameter.KEYWORD_ONLY, annotation=float)
    value = convert(text, parameter, "x=")
    recorded = recordable({"x": value, "more": (value, 1.0)})
    assert json.loads(canonical(recorded)) == {"x": text, "more": [text, 1.0]}
    assert str(from_option(recorded["x"], parameter, "x=")) == text == str(literal(text))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(:\n", r"python:.*mine\.py could not be imported: SyntaxError: .*\(mine\.py, line 1\)$"),
        ("x = 1\n1 / 0\n", r"could not be imported: ZeroDivisionError: division by zero \(mine\.py, line 2\)$"),
        (None, r"python:no_such_module could not be imported: ModuleNotFoundError: No module named 'no_such_module'$"),
    ],
)
def test_an_error_while_importing_names_the_line_of_the_users_code_and_no_line_of_ours(
    code: str | None, message: str, tmp_path: Path
) -> None:
    place = "no_such_module"
    if code is not None:
        place = str(tmp_path / "mine.py")
        (tmp_path / "mine.py").write_text(code)
    with pytest.raises(UserError, match=message):
        import_object(f"{place}:f")


def test_a_packages_module_that_does_not_exist_names_no_line_of_ours() -> None:
    entry = EntryPoint("lost", "no_such_module:f", "compress_ssl.methods")
    with pytest.raises(UserError, match="No module named 'no_such_module'; mend"):
        from_entry_point(entry, "method")
