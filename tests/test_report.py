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

from compress_ssl.pipeline.evaluators.base import Result, Split
from compress_ssl.pipeline.report import comparison, evaluation, figures, image_grids
from compress_ssl.pipeline.report import metrics as scores
from compress_ssl.pipeline.report.html import printable

ROOT = Path(__file__).parents[1]
MARKUP_NAMES = ("<script>alert(1)</script>", "a\"b'&amp;$\\frac$", "猫\udcff", "plain")

METRICS: dict[str, Any] = {
    "model": {"name": "small", "role": "student", "parameters": 1_000_000, "width": 128},
    "data": {"train": "folder:/a", "val": "folder:/b", "classes": 4},
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


TEACHER = changed(model={"name": "large", "role": "teacher", "parameters": 4_000_000, "width": 512}, nn__top1=60.1)


def splits(classes: tuple[str, ...] = ("a", "b", "c", "d"), labelled: bool = True) -> tuple[Split, Split]:
    label = [np.arange(n) % 4 if labelled else np.full(n, -1) for n in (60, 40)]
    features = [np.zeros((n, 2), np.float32) for n in (60, 40)]
    rows = [np.arange(60) + 1000, np.arange(40) + 5000]
    return Split(features[0], label[0], rows[0], classes), Split(features[1], label[1], rows[1], classes)


def results() -> dict[str, Result]:
    draw = np.random.default_rng(0)
    cluster = {
        "train_assignment": draw.integers(0, 4, 60),
        "mapping": np.array([0, 1, 3, -1]),
        "majority": np.array([0, 1, 2, -1]),
        "confusion": draw.integers(0, 9, (4, 5)),
    }
    nn = {"neighbors": draw.integers(0, 60, (40, 8))}
    curve = np.column_stack([np.linspace(2, 1, 10), np.linspace(10, 60, 10), np.linspace(40, 90, 10)])
    return {
        "nn": Result({}, nn),
        "cluster:clusters=4": Result({}, cluster),
        "linear": Result(METRICS["linear"], {"curve": curve}),
    }


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
    metrics = changed(model__name="<b>me</b> & $x$", data__note="</section>" + "x" * 300)
    folder = tmp_path_factory.mktemp("evaluation")
    return evaluation.write_report(
        folder, metrics, train=train, val=val, results=results(), teacher=TEACHER, curves=CURVES, load_image=load_image
    )


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
    """METRICS with this text wherever a metrics.json may hold one, keys that differ from data set to data set too."""
    metrics = replaced(changed(classifier={"top1": 70.0, "head": ""}, model__method="", model__spec=""), text)
    metrics["model"] |= {text: [text, text], "nested": {text: text}, **model}
    metrics["data"] |= {text: text}
    metrics["knn"] |= {text: {"top1": 50.0}}
    return metrics


def write_named(folder: Path, text: str) -> Parsed:
    """A report in which the classes and the protocols have this text as well."""
    train, val = splits(tuple(f"{text}{n}" for n in range(4)))
    found = results() | {"linear": Result({"protocol": text}, results()["linear"].arrays)}
    page = evaluation.write_report(
        folder,
        metrics_with(text),
        train=train,
        val=val,
        results=found,
        teacher=TEACHER,
        curves=CURVES,
        load_image=load_image,
    )
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
        pages.append(Parsed(comparison.compare([*rows, metrics_with(text, role="teacher"), {}])[1]))
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
    near = results()["nn"].arrays["neighbors"]
    agreements = {int(n): int((train.label[row] == val.label[n]).sum()) for n, row in enumerate(near)}
    assert len(strips) == image_grids.NEIGHBOUR_ROWS
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
    evaluation.write_report(tmp_path, METRICS, train=train, val=val, results=results(), load_image=load)
    assert {which for which, _ in loaded} == {"train", "val"}
    assert all(row in (train if which == "train" else val).rows for which, row in loaded)
    assert all(type(row) is int for _, row in loaded)


@pytest.mark.usefixtures("empty_figures")
def test_which_images_are_shown_depends_only_on_the_seed(tmp_path: Path) -> None:
    train, val = splits()
    some = {"nn": results()["nn"]}
    pages = [
        evaluation.write_report(
            tmp_path / str(n), {}, train=train, val=val, results=some, load_image=load_image, seed=seed
        ).read_bytes()
        for n, seed in enumerate((1, 1, 2))
    ]
    assert pages[0] == pages[1] != pages[2]


@pytest.mark.usefixtures("empty_figures")
def test_sections_without_data_are_left_out_of_the_page(tmp_path: Path) -> None:
    train, val = splits(labelled=False)
    unlabelled = {"cluster": Result({}, {"train_assignment": np.zeros(60, np.int64)})}
    scores = {"clusters": 4, "top1": None, "hungarian_top1": None, "nmi": None}
    page = evaluation.write_report(
        tmp_path, {"cluster": scores}, train=train, val=val, results=unlabelled, load_image=load_image
    )
    text = page.read_text()
    assert "no scores" in text and "Random images of random clusters" in text
    assert not any(word in text for word in ("Training</h2>", "Nearest neighbours", ">teacher<", "mapped to"))
    assert evaluation.write_report(tmp_path, {}, train=train, val=val, results={}).exists()


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
    found = {"cluster": Result({}, {"confusion": confusion, "train_assignment": np.zeros(1, np.int64)})}
    train, val = splits(names)
    text = evaluation.write_report(tmp_path, METRICS, train=train, val=val, results=found).read_text()
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
        "comparison.compare([{'model': {'name': 'a', 'parameters': 5}, 'nn': {'top1': 1.0}}])\n"
        "print('matplotlib.pyplot' in sys.modules, before == dict(matplotlib.rcParams))"
    )
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert finished.stdout.strip() == "False True", finished


# ---------------------------------------------------------------- comparison


def rows() -> list[dict[str, Any]]:
    return [
        changed(model__name="one", nn__top1=49.0),
        changed(model__name="two", nn__top1=52.04, linear=None),
        TEACHER,
        changed(model__name="three", nn__top1=51.96, model__parameters=500),
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
    text, _ = comparison.compare([METRICS, augmented])
    head = re.split(r"\s{2,}", text.splitlines()[0])
    assert "Linear" in head and "Linear (augmented)" in head


def test_both_probes_of_one_evaluation_have_columns_and_notes_of_their_own() -> None:
    augmented = {"last": {"top1": 70.0, "top5": 95.0}, "best": {"top1": 71.0}, "protocol": "augmented training images"}
    both = changed(linear_augmented=augmented)
    own = scores.headline_scores(both)
    assert (own["Linear"], own["Linear (augmented)"], own["Linear (augmented) best"]) == (60.0, 70.0, 71.0)
    assert list(own)[-6:] == [
        f"Linear{kind}{what}" for kind in ("", " (augmented)") for what in ("", " top-5", " best")
    ]
    assert "(centre-crop features, whitened)" in scores.explain_title("Linear", both)
    assert "(augmented training images)" in scores.explain_title("Linear (augmented)", both)


def test_the_first_probe_of_each_kind_is_drawn_with_its_protocol(tmp_path: Path) -> None:
    curve = {"curve": np.linspace(1, 50, 12).reshape(4, 3)}
    protocols = {"linear:epochs=4": "centre crops", "linear": "later", "linear:augment=true": "augmented & flipped"}
    found = {spec: Result({"protocol": protocol}, curve) for spec, protocol in protocols.items()}
    train, val = splits()
    text = evaluation.write_report(tmp_path, {}, train=train, val=val, results=found).read_text()
    assert re.findall("Protocol: (.*?)</p>", text) == ["centre crops.", "augmented &amp; flipped."]
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"linear.png", "linear_augmented.png"}


@pytest.mark.usefixtures("empty_figures")
def test_a_warning_names_the_keys_in_which_the_data_of_rows_differ() -> None:
    assert "same data" not in comparison.compare(rows())[0]
    text, page = comparison.compare([*rows(), changed(data__val="folder:/other")])
    assert "Not all rows were evaluated on the same data; they differ in: val." in text
    assert "they differ in: val." in page


def test_the_comparison_is_self_contained_and_escapes_names() -> None:
    text, page = comparison.compare([changed(model__name="<script>x</script>\n$y$"), TEACHER, {}, {"model": None}])
    assert_self_contained(page)
    assert html.escape("<script>x</script>") in page
    assert len(text.splitlines()) == 2 + 4 + 2  # a line break in a name does not break a row


@pytest.mark.usefixtures("empty_figures")
def test_without_any_score_there_is_still_a_table() -> None:
    text, page = comparison.compare([{"model": {"name": "a"}}])
    assert text.splitlines()[2].split() == ["a", "–", "–", "–"] and "<table" in page
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
