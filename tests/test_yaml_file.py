"""A YAML file is read to values that JSON has, or refused in words; no file makes it slow or large."""

import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress_ssl.pipeline.runtime.config_values import convert_values
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.yaml_file import MAX_LEVELS, read_yaml

BOMB = "a0: &a0 [x]\n" + "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9))
MERGE_BOMB = "a0: &a0 {x: 1}\n" + "\n".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 9)
)
CHAIN = "a0: &a0 [x]\n" + "\n".join(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 3000))

FAULTS = {
    "[" * 100_000: "nested too deeply",
    "- " * 5000 + "a": "nested too deeply",
    BOMB: "when its aliases are written out",
    MERGE_BOMB: "when its aliases are written out",
    CHAIN: "when its aliases are written out",
    "&a [*a]": "when its aliases are written out",
    "[" * (MAX_LEVELS + 1) + "]" * (MAX_LEVELS + 1): "when its aliases are written out",
    "a: b: c": "is no YAML: mapping values are not allowed here",
    "*a": "is no YAML: found undefined alias",
    "!!python/name:os.system": "is no YAML: could not determine a constructor",
    "2020-13-45": "is no YAML: month must be in 1..12",
    "9" * 5000: "is no YAML: Exceeds the limit",
    "!!timestamp soon": "is no YAML",
    "!!bool maybe": "is no YAML",
    "!!int ''": "is no YAML",
    '"\\UFFFFFFFF"': "is no YAML",
    "lr: {1: 2}": r"file.yaml: lr has the key 1, which is no text",
    "lr: 2020-01-01": r"file.yaml: lr holds a date",
    "lr: !!set {a}": r"file.yaml: lr holds a set",
    'out: {deep: "a\\0b"}': r"file.yaml: out.deep holds 'a\\x00b', with a character that cannot be printed",
    'out: "\\ud800"': "cannot be printed",
    '"\\e]0;x": 1': "cannot be printed",
}


@pytest.mark.parametrize("text", FAULTS, ids=range(len(FAULTS)))
def test_a_malformed_or_hostile_file_is_refused_in_words_and_at_once(text: str, tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text(text)
    began = time.monotonic()
    with pytest.raises(UserError, match=FAULTS[text]) as refused:
        read_yaml(tmp_path / "file.yaml")
    assert time.monotonic() - began < 20
    assert len(str(refused.value)) < 500 + len(str(tmp_path))


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_yaml(tmp_path / "gone.yaml")
    (tmp_path / "file.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="is no YAML"):
        read_yaml(tmp_path / "file.yaml")


def test_aliases_and_merge_keys_of_a_small_file_are_read(tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text("a: &a {lr: 1, steps: [2, x, null, true, 0.5]}\nb: {<<: *a, lr: 3}\nc: *a\n")
    steps = [2, "x", None, True, 0.5]
    a = {"lr": 1, "steps": steps}
    assert read_yaml(tmp_path / "file.yaml") == {"a": a, "b": {"lr": 3, "steps": steps}, "c": a}
    (tmp_path / "file.yaml").write_text("")
    assert read_yaml(tmp_path / "file.yaml") is None


@given(
    st.lists(st.sampled_from([*"[]{}:,-&*!|>%@'\"?#\n ~=", "!!int ", "!!set ", "<<: ", "a", "1e3", "\\u"]) | st.text())
)
def test_any_text_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    file = tmp_path_factory.mktemp("yaml") / "file.yaml"
    file.write_bytes("".join(parts).encode("utf-8", "surrogatepass"))
    try:
        content = read_yaml(file)
    except UserError as refused:
        assert str(file) in str(refused)
    else:
        assert content is None or isinstance(content, str | int | float | list | dict)


@dataclass(frozen=True)
class Flags:
    lr: float = 0.1
    steps: int | None = None
    resume: bool = False
    data: Path = Path()
    name: str = ""
    student: tuple[str, ...] = ()


def test_values_get_the_types_of_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    given_values = {"lr": "1e-3", "steps": None, "resume": True, "data": "~/a", "name": "x", "student": ["a", 1]}
    expected = {**given_values, "lr": 0.001, "data": Path("/home/me/a"), "student": ("a", "1")}
    assert convert_values(Flags, given_values) == expected
    assert convert_values(Flags, {"lr": 1, "student": "a"}) == {"lr": 1.0, "student": ("a",)}


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": "1.2.3e4"}, {"lr": 10**400}, {"lr": True}, {"lr": None}, {"steps": True}, {"steps": 1.5}, {"steps": [1]},
        {"resume": 1}, {"data": None}, {"data": 5}, {"data": "~nobody-has-this-name/x"}, {"name": 5},
        {"name": {"a": "b"}}, {"student": {"a": 1}}, {"student": [["a"]]}, {"student": [None]}, {"student": True},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_of_another_type_than_its_flag_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match="but must be|home folder is unknown"):
        convert_values(Flags, wrong)
