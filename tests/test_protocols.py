"""Protocols of a user's own: named by python: or by an entry point, scored, kept, shown, and refused in words."""

import ast
import json
import re
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress_ssl.pipeline.evaluators import PROTOCOLS
from compress_ssl.pipeline.evaluators.base import ConfusionMatrix, Result, Score, Split
from compress_ssl.pipeline.evaluators.results import Results
from compress_ssl.pipeline.runtime import artifact
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.storage import Folder
from compress_ssl.stages import compare, evaluate, inspect

ROOT = Path(__file__).parents[1]
MODEL = "convnet:channels=4+8"
CPU: dict[str, Any] = {"workers": 0, "device": "cpu", "train": "digits:split=test", "limit": 60, "image_size": 8}

pytestmark = pytest.mark.usefixtures("one_thread")


def documented(number: int) -> str:
    """The code of one of the page's examples."""
    return (ROOT / "docs/protocols.md").read_text().split("```python\n")[number + 1].split("```")[0]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """The example of docs/protocols.md as a file."""
    file = tmp_path / "mine.py"
    file.write_text(documented(0))
    return file


def score(out: Path, *protocols: str, **flags: Any) -> dict[str, Any]:
    """What `compress evaluate` returns for an untrained network on digits."""
    config = evaluate.Config(val="digits:split=test", model=MODEL, out=out, protocol=protocols, **CPU | flags)
    return evaluate.run(config)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation by `nn`, to be copied by the tests that change it."""
    out = tmp_path_factory.mktemp("scored") / "out"
    score(out, "nn")
    return out


def words(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", page))


# ---------------------------------------------------------------- end to end


def test_a_protocol_in_a_users_file_is_scored_and_shown_wherever_ours_are(mine: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = score(out, "nn", f"python:{mine}:Centroid,power=0.5")
    metrics = json.loads((out / "metrics.json").read_text())
    top1 = metrics["centroid"]["top1"]
    assert metrics == made["metrics"] and metrics["centroid"]["classes"] == 10 and 10 < top1 <= 100
    listed = metrics["scores"][-1]
    assert listed == {
        "key": "centroid.top1", "title": "Centroid", "value": top1, "note": "top-1 by the most similar class mean",
        "plotted": True, "options": {"power": 0.5},
    }  # fmt: skip
    assert re.search(rf"NN [\d.]+  Centroid {top1:.2f}\n", made["summary"])
    page = words((out / "report.html").read_text())
    assert f"Centroid top-1 by the most similar class mean {top1:.1f}" in page
    assert "Class means" in page and (out / "figures/centroid-classes.png").exists()

    compared = compare.run(compare.Config((str(out),), out=tmp_path / "compare.html"))
    assert compared["summary"].splitlines()[0].split()[-2:] == ["NN", "Centroid"]
    text = (tmp_path / "compare.html").read_text()
    assert "<dt>Centroid</dt><dd>top-1 by the most similar class mean</dd>" in text
    assert "Accuracy against size" in text


def test_the_scores_and_figures_of_an_earlier_command_stay_without_the_users_file(mine: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = score(out, f"python:{mine}:Centroid")["metrics"]
    mine.unlink()
    second = score(out, "nn")["metrics"]
    assert second["centroid"] == first["centroid"] and second["scores"][-1] == first["scores"][0]
    assert "Class means" in (out / "report.html").read_text()


def test_a_finished_protocol_is_run_again_only_if_its_file_or_its_options_have_changed(
    mine: Path, tmp_path: Path
) -> None:
    out, calls = tmp_path / "out", tmp_path / "calls"
    counted = mine.read_text().replace(
        "        present =", f"        open({str(calls)!r}, 'a').write('x')\n        present ="
    )
    mine.write_text(counted)
    spec = f"python:{mine}:Centroid"
    for options, runs in (("", 1), ("", 1), (",power=0.5", 2), (",power=0.5", 2)):
        score(out, spec + options)
        assert len(calls.read_text()) == runs, options
    mine.write_text(counted + "\n# another version\n")
    score(out, spec)
    assert len(calls.read_text()) == 3


def test_a_protocol_of_an_installed_package_is_a_kind_of_its_own(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(mine.parent))
    entry = metadata.EntryPoint("by-means", "mine:Centroid", "compress_ssl.protocols")
    monkeypatch.setitem(PROTOCOLS.__dict__, "_entry_points", {"by-means": [entry]})
    monkeypatch.setitem(PROTOCOLS.__dict__, "packages", {"by-means": entry})
    made = score(tmp_path / "out", "by-means:power=0.5")
    assert made["metrics"]["scores"][0]["title"] == "Centroid"


# ---------------------------------------------------------------- refused in words

HEAD = """
from dataclasses import dataclass
import numpy as np
from compress_ssl import Evaluator, Result, Score

"""
GOOD = (
    HEAD
    + """
@dataclass(frozen=True)
class Mine(Evaluator):
    name = "mine"
    def __call__(self, train, val, folder, augmented=None):
        return Result({"top1": 5.0}, scores=[Score("top1", "Mine", 5.0)])
"""
)


def broken(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (broken("(Evaluator)", ""), r"Mine is no subclass of .*Evaluator; derive it from that class"),
        (broken("def __call__", "def run"), r"Mine has no __call__\(train, val, folder, augmented\)"),
        (broken(", augmented=None", ""), r"Mine cannot be called with \(train, val, folder, augmented\)"),
        (broken("@dataclass(frozen=True)\n", ""), r"Mine is no dataclass; write @dataclass\(frozen=True\)"),
        (broken('name = "mine"', "pass"), r"Mine has the name None; give it a class variable"),
        (broken('"mine"', '"my_own"'), r"Mine has the name 'my_own'; give it a class variable `name` of letters"),
        (broken('"mine"', '"data"'), r"Mine has the name 'data', which metrics.json uses itself"),
        (broken('"mine"', '"knn"'), r"Mine has the name 'knn', which is that of a protocol of compress"),
        (broken('name =', 'needs_labels = ("val",); name ='), r"Mine has needs_labels = \('val',\); name only"),
        (broken("return", "1 / 0; return"), r"failed: ZeroDivisionError: division by zero \(mine.py, line 11\)"),
        (broken("return Result", "return np.linalg.inv"), r"failed: TypeError: .* \(mine.py, line 11\)"),
        (broken('return Result({"top1": 5.0}, scores=[Score("top1", "Mine", 5.0)])', "return 5.0"),
         r"Mine.__call__ \(mine.py, line 10\) returned a float; return a Result"),
        (broken('"Mine", 5.0', '"Mine", np.nan'), r"ValueError: score 'top1' is nan, not a finite number.*line 11"),
        (broken('"Mine", 5.0', '"Mine", 101.0'), r"ValueError: score 'top1' is 101.0, outside 0 to 100.*line 11"),
        (broken('{"top1": 5.0}', '{"top1": np.float32(5)}'), r"\(mine.py, line 10\) has metrics that are no JSON"),
        (broken('{"top1": 5.0}', '{"top1": (5.0,)}'), r"\(mine.py, line 10\) has metrics that JSON would change"),
        (broken('"Mine", 5.0)', '"Mine", 5.0), Score("top1", "Other", 5.0)'), r"two scores of the key 'top1'"),
        (broken("scores=[", "figures=[1], scores=["), r"has a int among its figures; the kinds are Lines, Conf"),
        (broken("scores=[", "arrays=[1], scores=["), r"has arrays that are no dictionary"),
    ],
)  # fmt: skip
def test_a_users_class_that_is_no_protocol_or_fails_is_refused_with_its_place(
    code: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(UserError, match=message):
        score(tmp_path / "out", f"python:{tmp_path / 'mine.py'}:Mine")
    assert not (tmp_path / "out/metrics.json").exists()


def test_two_protocols_of_one_name_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(GOOD)
    specs = [f"python:{tmp_path / name}.py:Mine" for name in ("one", "two")]
    with pytest.raises(UserError, match=r"both have the name 'mine', which is their entry in metrics\.json"):
        score(tmp_path / "out", *specs)
    assert not (tmp_path / "out").exists()


def test_two_options_of_one_protocol_that_would_hide_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cluster:clusters=5 and --protocol cluster:clusters=6 both write the entry"):
        score(tmp_path / "out", "cluster:clusters=5", "cluster:clusters=6")
    made = score(tmp_path / "out", "knn:k=20", "knn:k=5", "knn:k=5,temperature=0.5")
    assert [row["title"] for row in made["metrics"]["scores"]] == ["kNN 5", "kNN 5 T=0.5", "kNN 20"]


# ---------------------------------------------------------------- kept results


def split(n: int = 6) -> Split:
    return Split(np.zeros((n, 2), np.float32), np.arange(n) % 2, np.arange(n), ("a", "b"))


def kept(folder: Path) -> Results:
    return Results(Folder(folder), split(), split())


def test_a_figures_array_that_the_result_has_too_is_written_once(tmp_path: Path) -> None:
    counts = np.arange(4).reshape(2, 2)
    matrix = ConfusionMatrix(name="m", title="M", counts=counts, rows=("a", "b"), columns=("a", "b"))
    evaluator = PROTOCOLS.build("nn")
    kept(tmp_path).put(evaluator, "nn", Result({}, {"confusion": counts}, [Score("a", "A", 1.0)], [matrix]))
    (file,) = (tmp_path / "results").glob("*.npz")
    assert list(np.load(file)) == ["confusion"]
    result = kept(tmp_path).get(evaluator)
    assert result is not None
    (figure,) = result.figures
    assert isinstance(figure, ConfusionMatrix) and figure.columns == ("a", "b")
    np.testing.assert_array_equal(figure.counts, counts)


@pytest.mark.parametrize(
    "change",
    [
        {"metrics": 5}, {"scores": [{"key": "a"}]}, {"figures": [{"kind": "Nothing"}]}, {"figures": 7}, {"name": None},
        {"figures": [{"kind": "Bars", "name": "b", "title": "B", "labels": ["x"], "values": {"array": "none"}}]},
        {"scores": [{"key": "a", "title": "A", "value": 500.0}]}, {"options": []},
    ],
)  # fmt: skip
def test_a_kept_result_that_is_not_valid_is_computed_again(change: dict[str, Any], tmp_path: Path) -> None:
    evaluator = PROTOCOLS.build("nn")
    kept(tmp_path).put(evaluator, "nn", Result({"top1": 1.0}, {}, [Score("top1", "NN", 1.0)]))
    assert kept(tmp_path).get(evaluator) is not None
    (file,) = (tmp_path / "results").glob("*.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert kept(tmp_path).get(evaluator) is None
    assert kept(tmp_path).gather([]).scores == ()


def test_equal_titles_of_two_protocols_are_told_apart_and_equal_names_of_figures_too(tmp_path: Path) -> None:
    for spec in ("nn", "linear"):
        matrix = ConfusionMatrix(name="m", title="M", counts=np.ones((1, 1)), rows=("a",), columns=("a",))
        kept(tmp_path).put(PROTOCOLS.build(spec), spec, Result({}, {}, [Score("x", "Same", 1.0)], [matrix]))
    gathered = kept(tmp_path).gather([])
    assert [row.title for row in gathered.scores] == ["Same", "Same (linear.x)"]
    assert [figure.name for figure in gathered.figures] == ["m", "m-2"]


# ---------------------------------------------------------------- what is recorded


def test_a_repeated_command_takes_the_settings_of_the_evaluation_that_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = score(out, "nn", batch_size=32, precision="bf16", image_size=16)["metrics"]
    (manifest, features) = (json.loads((out / name / "manifest.json").read_text()) for name in (".", "features/val"))
    monkeypatch.setattr(evaluate, "BATCH_SIZE", 16)
    monkeypatch.setattr(evaluate, "PRECISION", "fp16")
    assert score(out, "nn", image_size=None)["metrics"] == first
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert features["identity"]["batch_size"] == 32 and manifest["identity"]["precision"] == "bf16"
    with pytest.raises(UserError, match="precision is .bf16. there, .fp32. asked"):
        score(out, "nn", image_size=None, precision="fp32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"knn": 5}, "knn is 5, not what the protocol 'knn' writes"),
        ({"nn": {"top1": "high"}}, "entry nn is not valid: top1: expected float | null, got str"),
        ({"nn": {"top1": 300}}, "entry nn is not valid: top1: expected float <= 100"),
        ({"nn": {}}, "entry nn is not valid: it lacks the entry top1"),
        ({"cluster": {"top1": []}}, "entry cluster is not valid"),
        ({"linear": {"last": 3}}, "entry linear is not valid: last"),
        ({"knn": {"20": None}}, "entry knn is not valid"),
        ({"classifier": [1]}, "classifier is \\[1\\], not what the protocol"),
        ({"model": None}, "model: expected object, got null"),
        ({"data": {}}, "data: it lacks the entry train"),
        ({"scores": 5}, "scores: expected array, got int"),
        ({"scores": [{"key": "a", "title": "A", "value": None}]}, "value: expected float, got null"),
        ({"scores": [{"key": "a", "title": "A", "value": 1e9}]}, "score 'a' is 1000000000.0, outside 0 to 100"),
        (None, "expected object, got array"),
    ],
)
def test_a_metrics_json_that_is_not_valid_is_refused_in_words_by_every_command_that_reads_it(
    change: dict[str, Any] | None, message: str, scored: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(scored, tmp_path / "out"))
    file = out / "metrics.json"
    metrics = json.loads(file.read_text())
    del metrics["scores"]  # as version 1 wrote it
    file.write_text(json.dumps([] if change is None else metrics | change))
    for command in (
        lambda: compare.run(compare.Config((str(out),), out=tmp_path / "compare.html")),
        lambda: inspect.run(inspect.Config(str(out))),
        lambda: score(tmp_path / "other", "nn", teacher=out),
    ):
        with pytest.raises(UserError, match=message) as refused:
            command()
        assert "repeat the command compress evaluate" in str(refused.value)


def test_a_damaged_metrics_json_is_written_again_by_the_command_that_made_it(scored: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(scored, tmp_path / "out"))
    before = (out / "metrics.json").read_bytes()
    (out / "metrics.json").write_text("[]")
    score(out, "nn")
    assert (out / "metrics.json").read_bytes() == before


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("identity", {"model": None}, "identity.model: expected object, got null"),
        ("identity", {"precision": "fp8"}, "identity.precision: invalid enum value 'fp8'"),
        ("identity", {"data": {"train": 1, "val": "x"}}, "identity.data.train: expected str, got int"),
        ("identity", {"other": 1}, "has the entry identity.other, which this version of compress does not know"),
        ("about", {"model": {"name": "x"}}, "about.model: it lacks the entry role"),
        ("about", {"val": []}, "about.val: expected str, got array"),
    ],
)
def test_an_evaluation_whose_manifest_is_whole_but_not_valid_is_refused_in_words(
    part: str, change: dict[str, Any], message: str, scored: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(scored, tmp_path / "out"))
    manifest = artifact.read(Folder(out), "evaluation")
    identity, about = (getattr(manifest, name) | (change if name == part else {}) for name in ("identity", "about"))
    artifact.write(Folder(out), "evaluation", identity, about)
    for command in (lambda: score(out, "nn"), lambda: inspect.run(inspect.Config(str(out)))):
        with pytest.raises(UserError, match=f"manifest.json.*{message}"):
            command()


# ---------------------------------------------------------------- nobody knows a protocol by name


def constants(file: Path) -> set[str]:
    """The texts in a file that are not part of a longer one."""
    nodes = ast.walk(ast.parse(file.read_text()))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_no_module_but_a_protocols_own_and_the_registry_has_its_name_or_the_titles_of_its_scores() -> None:
    """The defaults of --protocol are specs such as "nn" in stages/evaluate.py and stages/demo.py, which are data."""
    pipeline = ROOT / "pipeline"
    members = {PROTOCOLS.entries[name].partition(":")[0].rpartition(".")[2] for name in PROTOCOLS.entries}
    files = [file for room in ("report", "evaluators") for file in (pipeline / room).glob("*.py")]
    files += [ROOT / f"stages/{name}.py" for name in ("compare", "inspect")]
    names = {"nn", "knn", "cluster", "linear", "linear_augmented", "classifier", "NN", "kNN", "Cluster", "Linear"}
    for file in files:
        known = file.parent.name == "evaluators" and file.stem in {*members, "__init__"}
        assert known or not constants(file) & names, file
    imports = [
        re.findall(r"pipeline\.evaluators[.\w]*", file.read_text()) for file in (pipeline / "report").glob("*.py")
    ]
    assert {name for found in imports for name in found} == {"pipeline.evaluators.base"}


# ---------------------------------------------------------------- the page


def test_the_test_of_the_page_passes(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(mine.parent))
    scope: dict[str, Any] = {}
    exec(documented(1), scope)
    scope["test_centroid_meets_the_requirements_of_a_protocol"]()


# ---------------------------------------------------------------- defaults that change


def test_a_default_of_a_protocol_that_changes_changes_no_evaluation_that_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress_ssl.pipeline.evaluators.knn import WeightedNeighbors

    out = tmp_path / "out"
    score(out, "knn", "knn:k=5")
    before = (out / "metrics.json").read_bytes()
    monkeypatch.setattr(WeightedNeighbors.__init__, "__kwdefaults__", {"k": 3, "temperature": 0.5})
    monkeypatch.setattr(WeightedNeighbors, "temperature", 0.5)
    score(out, "knn", "knn:k=5")
    assert (out / "metrics.json").read_bytes() == before
    assert score(out, "knn", "knn:temperature=0.07")["metrics"]["knn"].keys() == {"20", "5", "3"}
    assert list(score(tmp_path / "new", "knn")["metrics"]["knn"]) == ["3,temperature=0.5"]


# ---------------------------------------------------------------- protocols that do harm

HARMFUL = '''
from dataclasses import dataclass
import numpy as np
from compress_ssl import Evaluator, Result, Score
from compress_ssl.pipeline.evaluators.figures import Bars, ConfusionMatrix, Lines, Panel
@dataclass(frozen=True)
class Harmful(Evaluator):
    """A test's."""
    name = "harmful"
    limit: float = float("inf")
    def __call__(self, train, val, folder, augmented=None):
        scores = [Score("a", "A", 1.0)]
        BODY
'''


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("train.features[:] = 0; return Result({}, {}, scores)", "has changed the features, labels or rows of a split"),
        ("val.label[:] = 0; return Result({}, {}, scores)", "has changed the features, labels or rows of a split"),
        ("raise SystemExit(3)", "failed: SystemExit: 3"),
        (r'return Result({}, {}, [Score("a", "A\nB", 1.0)])', "must be one line"),
        ("return Result({}, {}, None)", "has scores that are a NoneType; give a list"),
        ("return Result({}, {}, (s for s in scores))", "has scores that are a generator; give a list"),
        ("return Result({}, {}, scores, iter([]))", "has figures that are a list_iterator; give a list"),
        ('return Result({}, {}, [Score("a", "A", 1.0, unit=5)])', "has a score that cannot be kept"),
        ('return Result({}, {}, [Score("a", "A", 1.0, note=None)])', "has a score that cannot be kept"),
        ('return Result({}, {}, scores, [Bars(name="b", title=None, labels=("x",), values=np.ones(1))])', "be kept"),
        ('return Result({}, {}, scores, [Bars(name="b", title="t", labels=("x",), values=[1.0])])', "array of numbers"),
        (
            'return Result({}, {}, scores, [ConfusionMatrix(name="b", title="t", rows=(), columns=(), '
            "counts=np.zeros((0, 0)))])",
            "has no counts to draw",
        ),
        (
            'return Result({}, {}, scores, [Lines(name="b", title="t", panels=(Panel(title="p", x=[1.0], '
            'lines={"l": np.ones(1)}),))])',
            "array of numbers",
        ),
    ],
)  # fmt: skip
def test_a_protocol_that_does_harm_or_hands_over_what_cannot_be_read_again_is_refused_and_nothing_is_kept(
    body: str, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "harmful.py"
    file.write_text(HARMFUL.replace("BODY", body))
    with pytest.raises(UserError) as refusal:
        score(tmp_path / "out", f"python:{file}:Harmful", "nn")
    assert words in str(refusal.value)
    assert not list((tmp_path / "out").glob("results/*"))


def test_an_option_may_be_infinite_and_its_result_is_found_again(tmp_path: Path) -> None:
    file = tmp_path / "harmful.py"
    file.write_text(HARMFUL.replace("BODY", "CALLS.append(1); return Result({}, {}, scores)") + "CALLS = []\n")
    for _ in range(2):
        made = score(tmp_path / "out", f"python:{file}:Harmful")
    assert made["metrics"]["scores"][-1]["options"] == {"limit": "inf"}
    module = next(m for name, m in __import__("sys").modules.items() if name.endswith(f"/{tmp_path.name}/harmful%2Epy"))
    assert len(module.CALLS) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "spec",
    [
        "linear:weight_decay=-1", "linear:momentum=2", "linear:lr=inf", "linear:seed=99999999999999999999",
        "cluster:seed=2147483648", "cluster:iterations=2147483648", "linear:weight_decay=nan", "linear:momentum=-0.1",
    ],
)  # fmt: skip
def test_an_option_of_our_protocols_that_is_out_of_range_is_refused_by_its_name(spec: str, tmp_path: Path) -> None:
    option = spec.partition(":")[2].partition("=")[0]
    with pytest.raises(UserError, match=f"{option}=.* must be"):
        PROTOCOLS.build(spec)


def test_a_summary_without_scores_names_missing_labels_only_where_labels_are_missing(tmp_path: Path) -> None:
    file = tmp_path / "silent.py"
    file.write_text(HARMFUL.replace("BODY", "return Result({}, {}, [])"))
    assert score(tmp_path / "out", f"python:{file}:Harmful")["summary"].splitlines()[0].endswith("(model): no scores")
