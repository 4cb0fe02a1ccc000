"""What the pages contain: scores, images and names; and what they must never contain: markup from names, links."""

import html
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from compress_ssl.pipeline.evaluators import PROTOCOLS
from compress_ssl.pipeline.evaluators.base import (
    Bars,
    ConfusionMatrix,
    Evaluation,
    Evaluator,
    Figure,
    Lines,
    Panel,
    Score,
    Split,
)
from compress_ssl.pipeline.evaluators.record import parse_metrics
from compress_ssl.pipeline.report import comparison, evaluation, figures, image_grids
from compress_ssl.pipeline.report.html import printable

ROOT = Path(__file__).parents[1]
MARKUP_NAMES = ("<script>alert(1)</script>", "a\"b'&amp;$\\frac$", "猫\udcff", "plain")

METRICS: dict[str, Any] = {
    "model": {"name": "small", "role": "student", "parameters": 1_000_000, "width": 128},
    "data": {"train": "folder:/a", "train_images": 60, "val": "folder:/b", "val_images": 40, "classes": 4},
    "nn": {"top1": 54.12},
    "knn": {"20": {"top1": 55.0}, "5": {"top1": 53.0}, "100": {"top1": 50.0}},
    "cluster": {"top1": 33.3, "hungarian_top1": 34.4, "nmi": 40.0, "ari": 20.0, "clusters": 4},
    "linear": {
        "last": {"top1": 60.0, "top5": 90.0},
        "best": {"top1": 61.0, "top5": 91.0},
        "protocol": "centre-crop features, whitened",
    },
}
CURVES = [{"step": s, "loss": 5 / (1 + s), "lr": 0.1, "val_nn": 50.0 if s % 10 == 0 else None} for s in range(100)]


def changed(**changes: Any) -> dict[str, Any]:
    """METRICS with changes such as `nn__top1=1`; a value of None removes a protocol."""
    out = json.loads(json.dumps(METRICS))
    for key, value in changes.items():
        family, _, name = key.partition("__")
        if value is None:
            del out[family]
        elif name:
            out[family][name] = value
        else:
            out[family] = value
    return out


def read(metrics: dict[str, Any]) -> Evaluation:
    """The metrics.json of version 1 as it is read: its scores come from the entries of the protocols."""
    return parse_metrics(metrics, "metrics.json")


TEACHER = changed(model={"name": "large", "role": "teacher", "parameters": 4_000_000, "width": 512}, nn__top1=60.1)


def splits(classes: tuple[str, ...] = ("a", "b", "c", "d"), labelled: bool = True) -> tuple[Split, Split]:
    label = [np.arange(n) % 4 if labelled else np.full(n, -1) for n in (60, 40)]
    features = [np.zeros((n, 2), np.float32) for n in (60, 40)]
    rows = [np.arange(60) + 1000, np.arange(40) + 5000]
    return Split(features[0], label[0], rows[0], classes), Split(features[1], label[1], rows[1], classes)


def figures_of(spec: str, metrics: dict[str, Any], **arrays: np.ndarray) -> list[Figure]:
    """What a protocol of ours draws of its numbers and arrays."""
    protocol: type[Evaluator] = PROTOCOLS.resolve(spec)  # type: ignore[assignment]
    return list(protocol.figures_of(metrics, arrays, *splits()))


NEIGHBOURS = np.random.default_rng(1).integers(0, 60, (40, 8))


def all_figures(classes: tuple[str, ...] = ("a", "b", "c", "d"), protocol: str = "centre crops") -> list[Figure]:
    """The figures of our protocols. protocol: the text that the linear probe says of itself."""
    draw = np.random.default_rng(0)
    cluster = {
        "train_assignment": draw.integers(0, 4, 60),
        "mapping": np.array([0, 1, 3, -1]),
        "majority": np.array([0, 1, 2, -1]),
        "confusion": draw.integers(0, 9, (4, 5)),
    }
    curve = np.column_stack([np.linspace(2, 1, 10), np.linspace(10, 60, 10), np.linspace(40, 90, 10)])
    drawn: list[Figure] = []
    for spec, metrics, arrays in (
        ("nn", {}, {"neighbors": NEIGHBOURS}),
        ("cluster", {}, cluster),
        ("linear", {"protocol": protocol}, {"curve": curve}),
    ):
        kind: type[Evaluator] = PROTOCOLS.resolve(spec)  # type: ignore[assignment]
        drawn += kind.figures_of(metrics, arrays, *splits(classes))
    return drawn


def load_image(which: str, row: int) -> np.ndarray:
    side = {"train": (100, 140), "val": (8, 8)}[which]
    return np.full((*side, 3), (row * 7 % 256, row * 31 % 256, 90), np.uint8)  # of one colour, which compresses fast


@pytest.fixture
def empty_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces every figure by an empty one, for tests that do not look at figures."""
    dot = io.BytesIO()
    Image.new("RGBA", (1, 1)).save(dot, "PNG")
    monkeypatch.setattr(figures, "render", lambda chart: dot.getvalue())


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every section, and with names that contain markup."""
    train, val = splits(MARKUP_NAMES)
    metrics = changed(model__name="<b>me</b> & $x$", data__train="</section>" + "x" * 300)
    folder = tmp_path_factory.mktemp("evaluation")
    return evaluation.write_report(
        folder, read(metrics), all_figures(MARKUP_NAMES), splits={"train": train, "val": val}, teacher=read(TEACHER),
        curves=CURVES, load_image=load_image,
    )  # fmt: skip


class Parsed(HTMLParser):
    """The elements, attributes and text that a browser reads from a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, tuple[str, ...]]] = []  # tag, names of its attributes
        self.values: dict[str, set[str]] = {}  # of each attribute
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        for name, value in attrs:
            self.values.setdefault(name, set()).add(value or "")
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def assert_self_contained(text: str) -> None:
    links = re.findall(r"""(?:\bsrc|\bhref|\bsrcset|\baction|\bdata)\s*=\s*["']?([^"'\s>]*)""", text)
    assert all(link.startswith("data:image/") for link in links), [link[:40] for link in links]
    assert not re.search(r"https?:|url\(|@import|<script|<link|<iframe|\bon\w+\s*=", text)


def test_the_report_is_one_file_that_loads_nothing_from_the_network(page: Path) -> None:
    text = page.read_text()
    assert_self_contained(text)
    assert len(re.findall("src=", text)) > 50


def test_names_appear_as_text_in_the_page_and_never_as_markup(page: Path) -> None:
    text = Parsed(page.read_text()).text
    for name in ("<script>alert(1)</script>", "a\"b'&amp;$\\frac$", "<b>me</b> & $x$"):
        assert name in text
    assert "猫\\udcff" in text  # a byte that is not UTF-8 is escaped


def test_every_tag_that_is_opened_is_closed(page: Path) -> None:
    assert Parsed(page.read_text()).open == []


HOSTILE = (
    "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;{{ 7*7 }}{% %}</title></pre>\0\x1b[2J\u202e\udcff"
)
SHOWN = HOSTILE.partition("\0")[0] + r"\x00\x1b[2J\u202e\udcff"


def replaced(value: Any, text: str) -> Any:
    """Nested records with this text in place of every string."""
    if isinstance(value, dict):
        return {key: replaced(inner, text) for key, inner in value.items()}
    return text if isinstance(value, str) else value


def metrics_with(text: str, **model: Any) -> dict[str, Any]:
    """METRICS with this text wherever a metrics.json may hold one, a score of a protocol of a user's own too."""
    metrics = replaced(changed(classifier={"top1": 70.0, "head": ""}, model__method="", model__spec=""), text)
    metrics["model"] |= model
    metrics["knn"] |= {text: {"top1": 50.0}}
    mine = {"key": "mine", "title": text, "value": 1.5, "note": text, "term": text, "detail": text, "unit": text}
    return read(metrics).to_json() | {"scores": [*read(metrics).to_json()["scores"], mine | {"plotted": True}]}


def own_figures(text: str) -> list[Figure]:
    """Figures of a user's own protocol, of the kinds that are drawn as charts, with this text in every place."""
    panel = Panel(title=text, x=np.arange(3), lines={text: np.arange(3), f"{text}2": np.array([1, np.nan, 2])})
    return [
        Lines(name="own-lines", title=text, note=text, panels=(panel,), x_label=text, alt=text),
        Bars(name="own-bars", title=text, note=text, labels=(text, "b"), values=np.array([1, np.nan]), unit=text),
        ConfusionMatrix(
            name="own-matrix", title=text, note=text, counts=np.ones((2, 2)), rows=(text, "b"), columns=(text, "b"),
            row_title=text, column_title=text,
        ),
    ]  # fmt: skip


def write_named(folder: Path, text: str) -> Parsed:
    """A report in which the classes and the protocols have this text as well."""
    train, val = splits(tuple(f"{text}{n}" for n in range(4)))
    page = evaluation.write_report(
        folder, read(metrics_with(text)), [*all_figures(train.classes, text), *own_figures(text)],
        splits={"train": train, "val": val}, teacher=read(TEACHER), curves=CURVES, load_image=load_image,
    )  # fmt: skip
    return Parsed(page.read_text())


@pytest.mark.usefixtures("empty_figures")
def test_no_name_in_a_report_makes_an_element_or_an_attribute(tmp_path: Path) -> None:
    plain, hostile = (write_named(tmp_path / str(n), text) for n, text in enumerate(("plain", HOSTILE)))
    assert hostile.elements == plain.elements and hostile.open == []
    assert all(source.startswith("data:image/") for source in hostile.values["src"])
    assert hostile.values["title"] == {f"{SHOWN}{n}" for n in range(4)} <= hostile.values["alt"]
    in_raw_json = json.dumps(metrics_with("plain")).count("plain")  # JSON escapes its strings differently
    assert hostile.text.count(SHOWN) == plain.text.count("plain") - in_raw_json > 20
    assert printable(hostile.text) == hostile.text


@pytest.mark.usefixtures("empty_figures")
def test_no_name_in_a_comparison_makes_an_element_or_an_attribute() -> None:
    pages = []
    for text in ("plain", HOSTILE):
        rows = [
            metrics_with(text, run=f"/runs/{n}/{text}") for n in range(2)
        ]  # equal specs, so that their runs are shown
        rows += [metrics_with(text, role="teacher"), {key: METRICS[key] for key in ("model", "data")}]
        pages.append(Parsed(comparison.compare([read(row) for row in rows])[1]))
    plain, hostile = pages
    assert hostile.elements == plain.elements and hostile.open == []
    assert hostile.text.count(SHOWN) == plain.text.count("plain") > 10
    assert printable(hostile.text) == hostile.text


def test_figures_are_also_written_beside_the_page_as_opaque_png(page: Path) -> None:
    figures = {p.name: Image.open(io.BytesIO(p.read_bytes())) for p in (page.parent / "figures").iterdir()}
    assert set(figures) == {f"{n}.png" for n in ("training", "clusters", "neighbours", "confusion", "linear")}
    assert {figure.mode for figure in figures.values()} == {"RGB"}
    assert all(np.asarray(figure).std() > 5 for figure in figures.values())  # not a blank image


def test_the_page_shows_each_score_beside_the_teachers(page: Path) -> None:
    text = re.sub(r"<small>.*?</small>|<div class=\"bar\">.*?</div>|</?t[rd][^>]*>", " ", page.read_text())
    assert re.search(r"NN\s+54\.1\s+60\.1\s+−6\.0\s", text)
    assert re.search(r"NMI\s+40\.0\s+40\.0\s+0\.0\s", text)
    lead = "<b>90 %</b> of the teacher's NN accuracy (54.1 of 60.1) with <b>25 %</b> of its parameters (1M of 4M)."
    assert lead in " ".join(text.split())


def test_the_page_names_the_probes_protocol_and_its_selection_on_validation(page: Path) -> None:
    text = page.read_text()
    assert "centre-crop features, whitened" in text and "selected on the very set it is scored on" in text


def test_a_neighbours_tile_is_green_if_its_label_agrees_and_red_if_not(page: Path) -> None:
    train, val = splits()
    tiles = re.findall(r'<div class="strip">(.*?)</div>\s*(?=<div class="strip"|</div>)', page.read_text(), re.DOTALL)
    strips = [strip for strip in tiles if 'class="query' in strip]
    near = NEIGHBOURS
    agreements = {int(n): int((train.label[row] == val.label[n]).sum()) for n, row in enumerate(near)}
    assert len(strips) == 8
    for strip in strips:
        same, other = (len(re.findall(f'class="{tone}', strip)) for tone in ("yes", "no"))
        assert same + other == 8 and f"{same} of 8 agree" in strip and same in agreements.values()


@pytest.mark.usefixtures("empty_figures")
def test_images_are_loaded_by_their_row_in_the_data_set_not_by_their_index_in_the_split(tmp_path: Path) -> None:
    loaded: list[tuple[str, int]] = []

    def load(which: str, row: int) -> np.ndarray:
        loaded.append((which, row))
        return load_image(which, row)

    train, val = splits()
    evaluation.write_report(
        tmp_path, read(METRICS), all_figures(), splits={"train": train, "val": val}, load_image=load
    )
    assert {which for which, _ in loaded} == {"train", "val"}
    assert all(row in (train if which == "train" else val).rows for which, row in loaded)
    assert all(type(row) is int for _, row in loaded)


@pytest.mark.usefixtures("empty_figures")
def test_the_same_result_shows_the_same_images(tmp_path: Path) -> None:
    train, val = splits()
    pages = [
        evaluation.write_report(
            tmp_path / str(n), read(METRICS), all_figures(), splits={"train": train, "val": val}, load_image=load_image
        ).read_bytes()
        for n in range(2)
    ]
    assert pages[0] == pages[1]


@pytest.mark.usefixtures("empty_figures")
def test_sections_without_data_are_left_out_of_the_page(tmp_path: Path) -> None:
    train, val = splits(labelled=False)
    drawn = figures_of("cluster", {}, train_assignment=np.zeros(60, np.int64))
    bare = {key: METRICS[key] for key in ("model", "data")}
    scores = bare | {"cluster": {"clusters": 4, "top1": None, "hungarian_top1": None, "nmi": None}}
    page = evaluation.write_report(
        tmp_path, read(scores), drawn, splits={"train": train, "val": val}, load_image=load_image
    )
    text = page.read_text()
    assert "no scores" in text and "Random images of random clusters" in text
    assert not any(word in text for word in ("Training</h2>", "Nearest neighbours", ">teacher<", "mapped to"))
    without_images = evaluation.write_report(
        tmp_path, read(bare), drawn, splits={"train": train, "val": val}
    ).read_text()
    assert "Random images of random clusters" not in without_images


def test_rows_of_the_metrics_log_that_lack_a_value_are_skipped() -> None:
    rows: list[dict[str, Any]] = [
        {"step": 3, "loss": 1.0},
        {"step": 1, "loss": float("nan")},
        {"step": 2, "loss": 4.0, "val_nn": None},
        {},
    ]
    np.testing.assert_array_equal(evaluation.select_series(rows, "loss"), [[2, 4], [3, 1]])
    assert evaluation.select_series(rows, "val_nn").shape == (0, 2)


def test_a_thousand_categories_fit_on_the_page(tmp_path: Path) -> None:
    names = tuple(f"n{n:08d}" for n in range(1000))
    confusion = np.eye(1000, 1001, dtype=np.int64) * 50
    confusion[3, 7] = 99
    matrix = ConfusionMatrix(
        name="confusion", title="Confusion", counts=confusion, rows=names, columns=(*names, "(none)")
    )
    train, val = splits(names)
    text = evaluation.write_report(tmp_path, read(METRICS), [matrix], splits={"train": train, "val": val}).read_text()
    assert 'n00000003 &rarr; n00000007</td><td class="n">99' in text
    with Image.open(tmp_path / "figures" / "confusion.png") as figure:
        assert figure.width < 2000


def test_an_image_of_another_type_or_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8"):
        image_grids.crop_square(np.zeros((3, 8, 8), np.float32))


def test_drawing_neither_imports_pyplot_nor_changes_matplotlibs_settings() -> None:
    code = (
        "import sys, matplotlib; before = dict(matplotlib.rcParams)\n"
        "from compress_ssl.pipeline.report import comparison\n"
        "from compress_ssl.pipeline.evaluators.base import DataRecord, Evaluation, ModelRecord, Score\n"
        "model, data = ModelRecord('a', 'model', 5, 3), DataRecord('x', 9, 'y', 9, 2)\n"
        "comparison.compare([Evaluation(model, data, (Score('nn', 'NN', 1.0, plotted=True),), {})])\n"
        "print('matplotlib.pyplot' in sys.modules, before == dict(matplotlib.rcParams))"
    )
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert finished.stdout.strip() == "False True", finished


# ---------------------------------------------------------------- comparison


def rows() -> list[Evaluation]:
    return [
        read(metrics)
        for metrics in (
            changed(model__name="one", nn__top1=49.0),
            changed(model__name="two", nn__top1=52.04, linear=None),
            TEACHER,
            changed(model__name="three", nn__top1=51.96, model__parameters=500),
        )
    ]


@pytest.mark.usefixtures("empty_figures")
def test_the_teacher_is_the_first_row_and_the_others_keep_their_order() -> None:
    text, _ = comparison.compare(rows())
    assert [line.split()[0] for line in text.splitlines()[2:6]] == ["large", "one", "two", "three"]


@pytest.mark.usefixtures("empty_figures")
def test_the_best_student_of_each_column_is_marked_and_so_are_scores_that_read_the_same() -> None:
    text, page = comparison.compare(rows())
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert "52.0*" in lines["two"] and "52.0*" in lines["three"]  # equal as they are shown
    assert "*" not in lines["large"] and "49.0*" not in lines["one"]
    assert "* best of the students" in text
    assert "<b>52.0</b>" in page and "<b>60.1</b>" not in page


@pytest.mark.usefixtures("empty_figures")
def test_a_protocol_that_a_row_lacks_is_shown_as_a_dash() -> None:
    text, page = comparison.compare(rows())
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert lines["two"].split()[-3:] == ["–"] * 3 and "–" not in lines["one"]
    assert page.count('<td class="n">–</td>') == 3


@pytest.mark.usefixtures("empty_figures")
def test_the_columns_of_the_text_table_are_aligned_with_their_titles() -> None:
    text, _ = comparison.compare(rows())
    head, rule, *lines = text.splitlines()[:6]
    for start, end in [match.span() for match in re.finditer("-+", rule)][2:]:
        for line in (head, *lines):
            cell = line[:end].rstrip(" *")
            assert start < len(cell) <= end and cell[-1] != " ", (line, start, end)
    order = ["NN", "kNN 5", "kNN 20", "kNN 100", "Cluster", "Hungarian", "NMI", "ARI", "Linear", "Linear top-5"]
    assert [head.index(title) for title in order] == sorted(head.index(title) for title in order)


@pytest.mark.usefixtures("empty_figures")
def test_augmented_and_centre_crop_probes_never_share_a_column() -> None:
    augmented = changed(linear__protocol="augmented training images, whitened")
    text, _ = comparison.compare([read(METRICS), read(augmented)])
    head = re.split(r"\s{2,}", text.splitlines()[0])
    assert "Linear" in head and "Linear (augmented)" in head


def test_both_probes_of_one_evaluation_have_columns_and_notes_of_their_own() -> None:
    augmented = {"last": {"top1": 70.0, "top5": 95.0}, "best": {"top1": 71.0}, "protocol": "augmented training images"}
    both = changed(linear_augmented=augmented)
    own = {score.title: (score.value, score.description) for score in read(both).scores}
    assert list(own)[-6:] == [
        f"Linear{kind}{what}" for kind in ("", " (augmented)") for what in ("", " top-5", " best")
    ]
    assert [own[f"Linear{kind}"][0] for kind in ("", " (augmented)", " (augmented) best")] == [60.0, 70.0, 71.0]
    assert "(centre-crop features, whitened)" in own["Linear"][1]
    assert "(augmented training images)" in own["Linear (augmented)"][1]


def test_the_probe_of_each_kind_is_drawn_with_its_protocol_under_one_heading(tmp_path: Path) -> None:
    curve = np.linspace(1, 50, 12).reshape(4, 3)
    drawn = [
        figure
        for protocol in ("centre crops", "augmented & flipped")
        for figure in figures_of("linear", {"protocol": protocol}, curve=curve)
    ]
    train, val = splits()
    text = evaluation.write_report(tmp_path, read(METRICS), drawn, splits={"train": train, "val": val}).read_text()
    assert re.findall("Protocol: (.*?)</p>", text) == ["centre crops.", "augmented &amp; flipped."]
    assert text.count("<h2>Linear layer</h2>") == 1
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"linear.png", "linear_augmented.png"}


@pytest.mark.usefixtures("empty_figures")
def test_a_warning_names_the_keys_in_which_the_data_of_rows_differ() -> None:
    assert "same data" not in comparison.compare(rows())[0]
    text, page = comparison.compare([*rows(), read(changed(data__val="folder:/other"))])
    assert "Not all rows were evaluated on the same data; they differ in: val." in text
    assert "they differ in: val." in page


def test_the_comparison_is_self_contained_and_escapes_names() -> None:
    bare = {key: METRICS[key] for key in ("model", "data")}
    named = changed(model__name="<script>x</script>\n$y$")
    text, page = comparison.compare([read(metrics) for metrics in (named, TEACHER, bare, METRICS)])
    assert_self_contained(page)
    assert html.escape("<script>x</script>") in page
    assert len(text.splitlines()) == 2 + 4 + 1  # a line break in a name does not break a row


@pytest.mark.usefixtures("empty_figures")
def test_without_any_score_there_is_still_a_table() -> None:
    text, page = comparison.compare([read({key: METRICS[key] for key in ("model", "data")})])
    assert text.splitlines()[2].split() == ["small", "student", "1M", "128"] and "<table" in page
    assert comparison.compare([])[0].startswith("model")


def test_names_in_the_scatter_cover_neither_points_nor_each_other() -> None:
    x, y = np.array([50.0, 50, 50, 120]), np.array([80.0, 81, 82, 81])
    labels = figures.place_labels(x, y, ["one", "two", "three", "four"], 200.0)
    boxes = []
    for a, b, (side, rise), name in zip(x, y, labels, ("one", "two", "three", "four"), strict=True):
        left, right = sorted((a + side * 7, a + side * (7 + 4.6 * len(name))))
        boxes.append((left, right, b + rise))
    for n, (left, right, height) in enumerate(boxes):
        assert not any(left < r and near < right and abs(height - h) < 10 for near, r, h in boxes[:n])


@pytest.mark.parametrize("title", ["$\\bad{$ (%)", "a$b$", "\ud800", "x" * 10_000, "\x00"], ids=range(5))
def test_a_title_of_any_text_can_be_drawn(title: str) -> None:
    curves = figures.draw_curves({title: np.array([[0.0, 1.0], [1.0, 2.0]])})
    scatter = figures.draw_scatter({title: [figures.Dot(title, 100, 50.0, True)]})
    for chart in (curves, scatter):
        assert Image.open(io.BytesIO(figures.render(chart))).size[0] > 100


def test_a_rendered_figure_has_a_transparent_background() -> None:
    image = Image.open(io.BytesIO(figures.render(figures.Chart(lambda figure: None, (1, 1)))))
    assert image.mode == "RGBA" and np.asarray(image)[..., 3].max() == 0


# ---------------------------------------------------------------- a protocol of a user's own


def with_score(score: Score, **changes: Any) -> Evaluation:
    """METRICS and one more score."""
    known = read(changed(**changes))
    return Evaluation(known.model, known.data, (*known.scores, score), {**known.protocols, "mine": {}})


@pytest.mark.usefixtures("empty_figures")
def test_a_score_of_any_protocol_is_a_row_of_the_report_and_a_column_of_the_comparison(tmp_path: Path) -> None:
    own, teachers = (
        with_score(Score("mine.rank", "Mean rank", value, "rank of the right image", unit="places", range=(1, 40),
                         best="lowest"), model__name=name, model__role=role)
        for value, name, role in ((4.0, "small", "student"), (2.5, "large", "teacher"))
    )  # fmt: skip
    train, val = splits()
    page = evaluation.write_report(tmp_path, own, splits={"train": train, "val": val}, teacher=teachers).read_text()
    row = next(part for part in page.split("<tr>") if "Mean rank" in part)
    assert "rank of the right image" in row and "4.0 places" in row and 'class="n down">+1.5' in row
    worse = with_score(Score("mine.rank", "Mean rank", 9.0, unit="places", range=(1, 40), best="lowest"))
    text, page = comparison.compare([own, worse])
    assert "Mean rank (places)" in text and "4.0*" in text and "9.0*" not in text
    assert "<dt>Mean rank</dt><dd>rank of the right image</dd>" in page


@pytest.mark.usefixtures("empty_figures")
def test_a_score_without_a_unit_is_shown_without_one_and_without_empty_brackets(tmp_path: Path) -> None:
    own = with_score(Score("mine.rank", "Mean rank", 4.0, unit="", range=(1, 40), plotted=True))
    train, val = splits()
    page = evaluation.write_report(tmp_path, own, splits={"train": train, "val": val})
    assert '<td class="n big">4.0</td>' in page.read_text()
    text, compared = comparison.compare([own])
    assert "()" not in text and "()" not in compared
    assert own.summary.endswith("Mean rank 4.00")


def test_a_comparison_plots_the_scores_that_ask_for_it_and_no_others() -> None:
    plotted: list[str] = []
    original = figures.draw_scatter

    def draw(panels: Any) -> figures.Chart:
        plotted.extend(panels)
        return original(panels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw_scatter", draw)
        comparison.compare([with_score(Score("mine.a", "Mine", 5.0, plotted=True))])
    assert plotted == ["NN (%)", "Cluster (%)", "Linear (%)", "Mine (%)"]


@pytest.mark.parametrize(
    ("low", "high", "value", "share"),
    [(0, 100, 25, 0.25), (-50, 100, 20, 0.2), (-50, 100, -10, 0), (1, 41, 11, 0.25), (-3, -1, -2, 0.5)],
)
def test_a_bar_begins_at_zero_unless_the_range_leaves_it_out(
    low: float, high: float, value: float, share: float
) -> None:
    score = Score("a", "A", value, range=(low, high))
    assert score.fraction(score.value) == pytest.approx(share)


@pytest.mark.usefixtures("empty_figures")
def test_the_numbers_of_a_protocol_that_is_not_known_here_are_shown_by_their_names(tmp_path: Path) -> None:
    model = {"name": "net", "role": "model", "parameters": 5, "width": 3}
    data = {"train": "digits", "train_images": 6, "val": "digits", "val_images": 6, "classes": 3}
    mine = {"top1": 50, "seconds": 120.5, "how": "fast", "good": True, "nested": {"top1": 1}}
    own = parse_metrics({"model": model, "data": data, "mine": mine, "nn": {"top1": 40.0}}, "metrics.json")
    assert [(score.title, score.value) for score in own.scores] == [
        ("NN", 40.0), ("mine top1", 50.0), ("mine seconds", 120.5),
    ]  # fmt: skip
    train, val = splits()
    page = evaluation.write_report(tmp_path, own, splits={"train": train, "val": val}).read_text()
    table, compared = comparison.compare([own])
    assert all(text in shown for text in ("mine top1", "120.5") for shown in (page, table, compared))
