"""Numbers, records and lines of logs of any content are formatted or left out, and never raise."""

import io
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress_ssl.pipeline.runtime import formatting
from compress_ssl.pipeline.runtime.formatting import format_count, format_number, format_value, is_finite
from compress_ssl.pipeline.runtime.jsonl import parse_jsonl
from compress_ssl.pipeline.runtime.progress import ProgressBar

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner), max_leaves=9
)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 10**400, -(10**400), "5", None, [1]])
def test_a_number_that_cannot_be_drawn_is_not_finite(number: object) -> None:
    assert not is_finite(number)
    assert format_count(number) == format_number(number) == formatting.DASH


@given(JSON)
def test_any_value_of_a_record_is_formatted(value: object) -> None:
    assert all(isinstance(form(value), str) for form in (format_count, format_number, format_value))


def test_lines_that_are_no_objects_are_skipped() -> None:
    rows: list[dict[str, object]] = [{"step": 1}, {}, {"loss": None}]
    lines = ["", "{", "5", "null", '"step"', "[1, 2]", "[" * 100_000, '{"a":' * 100_000, "\x00", "9" * 5000]
    lines += [json.dumps(row) for row in rows]
    assert parse_jsonl("\n".join(lines)) == rows


def test_progress_of_a_command_whose_stderr_is_closed_goes_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert isinstance(ProgressBar("images", 2, "image").stream, io.StringIO)
    program = "from compress_ssl.pipeline.runtime.progress import echo; echo('for people'); print('result')"
    ended = subprocess.run(["sh", "-c", '"$0" -c "$1" 2>&-', sys.executable, program], capture_output=True, text=True)
    assert ended.stdout == "result\n"
