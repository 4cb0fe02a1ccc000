"""Data sets, models, methods and protocols of a user's own: the examples of docs/plugins.md, by place and packaged."""

import json
import os
import pickle
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from compress_ssl.pipeline.datasets import DATASETS
from compress_ssl.pipeline.datasets.base import content_hash
from compress_ssl.pipeline.datasets.decode import BROKEN, BadImage
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.registry import Registry
from compress_ssl.pipeline.runtime.storage import open_storage
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.stages import distill, export_teacher, listing, verify

DOCS = Path(__file__).parents[1] / "docs"
PAGE, PROTOCOLS_PAGE = ((DOCS / name).read_text() for name in ("plugins.md", "protocols.md"))
CPU = {"device": "cpu", "workers": 0}


def blocks(language: str, page: str = PAGE) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with the files of the page and a table of twelve images in two classes."""
    for block in blocks("python"):
        (tmp_path / block.partition("\n")[0].removeprefix("# ")).write_text(block)
    lines = []
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:02d}.png")
        lines.append(f"{number:02d}.png,{('cat', 'dog')[number % 2]}\n")
    (tmp_path / "photos.csv").write_text("".join(reversed(lines)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    loaded = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - loaded:
        if name.startswith("python:") or name in ("photos", "nets", "losses", "mine"):
            del sys.modules[name]


def run_command(*words: str) -> None:
    """Run `compress WORDS` in this process."""
    from compress_ssl import cli

    assert not cli.app(list(words), standalone_mode=False)


# ---------------------------------------------------------------- by place


def test_the_commands_of_the_page_work_and_record_what_leads_to_the_images_from_any_folder(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = PAGE.replace("\\\n", "")
    commands = [line.split() for line in text.splitlines() if line.startswith("    compress ") and "..." not in line]
    assert [words[1] for words in commands] == ["export-teacher", "distill", "evaluate"]
    for words in commands:
        run_command(*words[1:], "--device", "cpu", "--workers", "0")
    spec = f"python:{home}/photos.py:Listed,table={home}/photos.csv"
    about = json.loads((home / "teacher/manifest.json").read_text())["about"]
    assert about["data"]["spec"] == spec and about["teacher"] == f"python:{home}/nets.py:tiny,width=8"
    metrics = json.loads((home / "run/evaluation/metrics.json").read_text())
    assert 0 <= metrics["nn"]["top1"] <= 100
    (home / "elsewhere").mkdir()
    monkeypatch.chdir(home / "elsewhere")
    assert verify.run(verify.Config(str(home / "teacher"), sample=1.0, device="cpu"))["exact"] == 12
    options = {"steps": 2, "batch_size": 4, "image_size": 16, "device": "cpu", "workers": 2}
    distill.run(distill.Config(str(home / "teacher"), ("convnet",), "compress-1q", Path("run"), **options))  # type: ignore
    assert Path("run/student.safetensors").is_file()


def test_the_tests_of_the_page_pass(home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_photos.py", "test_nets.py"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout


def test_dask_workers_load_a_data_set_from_a_users_file_and_leave_out_a_bad_image(home: Path) -> None:
    (home / "03.png").unlink()
    export_teacher.run(
        export_teacher.Config(
            "python:photos.py:Listed,table=photos.csv", "python:nets.py:tiny", "store", views=1, scheduler="processes:1"
        )
    )
    assert np.flatnonzero(FeatureStore(open_storage("store")).table("status")).tolist() == [3]
    assert "No such file or directory" in (home / "store/bad-images.tsv").read_text()


def test_a_data_set_from_a_file_pickles_to_a_process_that_has_not_imported_the_file(home: Path) -> None:
    dataset = DATASETS.build("python:photos.py:Listed,table=photos.csv").subset(3)
    (home / "pickled").write_bytes(pickle.dumps(dataset))
    program = "import pickle; print(pickle.load(open('pickled', 'rb')).load(2)[1])"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == str(dataset.load(2)[1]), done.stderr


def test_a_users_file_is_executed_once_unless_it_changes(home: Path) -> None:
    (home / "mine.py").write_text("from photos import Listed\nprint('executed')\nclass Mine(Listed): pass\n")
    first, second = (type(DATASETS.build("python:mine.py:Mine,table=photos.csv").original) for _ in range(2))  # type: ignore[attr-defined]
    assert first is second
    (home / "mine.py").write_text("from photos import Listed\nclass Mine(Listed):\n    remedy = 'ask me'\n")
    assert DATASETS.build("python:mine.py:Mine,table=photos.csv").subset(2).remedy == "ask me"


MINE = """import numpy as np
from PIL import Image
from compress_ssl import Dataset
from compress_ssl.pipeline.datasets.decode import BadImage

class Items:
    classes = np.array(["x", "y", "never"])
    def __init__(self, count=4, size=8, **attributes):
        self.count, self.size = count, size
        vars(self).update(attributes)
    def __len__(self):
        return self.count
    def __getitem__(self, i):
        if i == 2:
            raise KeyError("row 2")
        return Image.new("L", (self.size, self.size), i), i % 2

def labelled(): return Items(targets=[0, 1, 1, 0], ids=["d", "c", "b", "a"])
def words(): return Items(targets=list("abcd"))
def short(): return Items(targets=[0])
def nothing(): return None
def arrays(): return [np.zeros((3, 8, 8), np.float32)]
def greys(): return [np.zeros((8, 8), np.uint8)]
def strict(count: "int"): return Items(count)
def broken(): raise RuntimeError("no server")
def empty(): return []
def same(): return Items(ids=["a"] * 4)

class Fails(Dataset):
    ids, label, classes = ["a"], np.array([-1]), ()
    def load(self, i):
        return self.server.get(i)
    def changed_rows(self, content, since):
        return self.server.changed()
class Exits(Fails):
    def load(self, i):
        raise SystemExit("no")
class Reversed(Fails):
    def load(self, i):
        pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)[::-1]
        pixels.flags.writeable = False
        return pixels, 1
def ends(): raise SystemExit(3)
def surrogate(): return Items(ids=["a", "b", "\\udc80", "d"])
def codes(): return type("Codes", (Items,), {"classes": None})(targets=[0, 1, 2, 10**9])
class Good(Fails):
    def load(self, i):
        raise BadImage(0, "but its status is that of a good one")
class Floats(Fails):
    def load(self, i):
        return np.zeros((8, 8, 3)), 0
class Unfinished(Dataset):
    ids, label, classes = ["a"], np.array([-1]), ()
"""


@pytest.fixture
def mine(home: Path) -> str:
    (home / "mine.py").write_text(MINE)
    return "python:mine.py"


def test_a_map_style_data_set_has_the_labels_classes_and_ids_of_its_attributes(mine: str) -> None:
    dataset = DATASETS.build(f"{mine}:labelled")
    assert (dataset.ids, dataset.label.tolist(), dataset.classes) == (list("dcba"), [0, 1, 1, 0], ("x", "y"))
    pixels, content = dataset.load(3)
    assert (pixels == 3).all() and pixels.shape == (8, 8, 3) and content == content_hash(pixels)
    assert (DATASETS.build(f"{mine}:greys").load(0)[0] == 0).all()


def test_labels_that_only_the_items_have_are_not_used_and_a_line_says_so_once(
    mine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        dataset = DATASETS.build(f"{mine}:Items,count=3")
        assert dataset.ids == ["00000000", "00000001", "00000002"] and (dataset.label == -1).all()
    assert capsys.readouterr().err.count("is used without labels") == 1


def test_an_exception_in_a_users_load_makes_a_bad_image_with_file_and_line_as_its_reason(mine: str) -> None:
    for spec, message in {
        f"{mine}:labelled": r"KeyError: 'row 2' \(mine.py, line 15\)",
        f"{mine}:Fails": r"AttributeError: 'Fails' object has no attribute 'server' \(mine.py, line 32\)",
        f"{mine}:Exits": r"SystemExit: no \(mine.py, line 37\)",
        f"{mine}:Good": "but its status is that of a good one",
        f"{mine}:Floats": r"returned float64 \(8, 8, 3\) as pixels",
    }.items():
        with pytest.raises(BadImage, match=message) as caught:
            DATASETS.build(spec).load(2)
        assert caught.value.status == BROKEN


def test_pixels_of_any_layout_are_rendered(mine: str) -> None:
    pixels, _ = DATASETS.build(f"{mine}:Reversed").load(0)
    assert pixels.flags.c_contiguous and pixels.flags.writeable and pixels[0, 0, 0] == 36


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("words", "its attribute targets must have one whole number per image"),
        ("short", "its attribute targets must have one whole number per image"),
        ("nothing", "returned a NoneType without __len__ and __getitem__"),
        ("arrays", r"it is a ndarray of float32 \(3, 8, 8\): take out transforms such as ToTensor"),
        ("broken", r"python:mine.py:broken failed: RuntimeError: no server \(mine.py, line 25\)"),
        ("empty", "has no images"),
        ("ends", r"python:mine.py:ends failed: SystemExit: 3 \(mine.py, line"),
        ("surrogate", r"must be UTF-8, but '\\udc80' is not"),
        ("codes", "the label 1000000000 is no number of a class"),
        ("same", "'a' is there twice"),
        ("Unfinished", r"failed: TypeError: Can't instantiate abstract class Unfinished"),
        ("strict,cuont=3", "strict has no key 'cuont'; did you mean 'count'. Known: count"),
        ("strict,count=many", "python:mine.py:strict count=many: must be a whole number"),
        ("strict", "python:mine.py:strict needs count="),
    ],
)
def test_what_is_no_data_set_is_refused_in_words(mine: str, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DATASETS.build(f"{mine}:{name}")


def test_an_error_in_a_users_changed_rows_is_reported_with_file_and_line(mine: str) -> None:
    with pytest.raises(UserError, match=r"changed_rows of python:mine.py:Fails failed: .* \(mine.py, line 34\)"):
        DATASETS.build(f"{mine}:Fails").subset(1).changed_rows(np.zeros(1, np.uint64), 0.0)


# ---------------------------------------------------------------- packages


def install(site: Path, name: str, version: str, entry_points: str) -> None:
    """What `pip install` leaves in a folder of packages: the entry points and the name of a distribution."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)


def to_ini(groups: dict[str, dict[str, str]]) -> str:
    """The entry points of a pyproject.toml as they are written into a dist-info folder."""
    sections = (f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in groups.items())
    return "\n".join(sections)


COMMANDS = """
import sys
from compress_ssl import cli
for words in {commands!r}:
    assert not cli.app(words.split(), standalone_mode=False)
"""


def test_a_package_adds_kinds_to_every_family_that_commands_take_and_listings_show(home: Path) -> None:
    project = tomllib.loads(blocks("toml")[0])["project"]
    site = home / "site"
    install(site, project["name"], project["version"], to_ini(project["entry-points"]))
    for file in ("photos.py", "nets.py", "losses.py"):
        (home / file).rename(site / file)
    (site / "mine.py").write_text(blocks("python", PROTOCOLS_PAGE)[0])
    cpu = "--device cpu --workers 0"
    commands = [
        f"export-teacher --data listed:table=photos.csv --teacher tiny:width=6 --views 2 --out teacher {cpu}",
        f"distill --store teacher --student tiny --method squared:weight=2 --steps 1 --batch-size 4 --out run {cpu}",
        f"evaluate --run run --val listed:table=photos.csv --protocol centroid:power=2 {cpu}",
        *(f"{listing} --json" for listing in ("datasets", "models", "methods", "protocols")),
    ]
    done = subprocess.run(
        [sys.executable, "-P", "-c", COMMANDS.format(commands=commands)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    about = json.loads((home / "teacher/manifest.json").read_text())["about"]
    assert about["data"]["spec"] == f"listed:table={home}/photos.csv" and about["teacher"] == "tiny:width=6"
    metrics = json.loads((home / "run/evaluation/metrics.json").read_text())
    assert [score["key"] for score in metrics["scores"]] == ["centroid.top1"]
    menus = [json.loads(line)["menu"] for line in done.stdout.splitlines() if line.startswith("{")]
    for menu, kind, key, summary in zip(
        menus, ("listed", "tiny", "squared", "centroid"), ("table", "width", "weight", "power"),
        ("The image files that a table lists", "A teacher for a test", "Squared distance", "Top-1 of"), strict=True,
    ):  # fmt: skip
        assert menu[kind]["package"] == "photo-plugins 1.2" and key in menu[kind]["keys"]
        assert menu[kind]["summary"].startswith(summary)


@pytest.fixture
def site(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages on Python's path."""
    monkeypatch.setattr(sys, "path", [str(home / "site"), *sys.path])
    return home / "site"


def registry() -> Registry[object]:
    """One that has not read the entry points yet."""
    return Registry("thing", {**DATASETS.entries}, packages="compress_ssl.things")


def test_a_misspelt_kind_of_a_package_gets_a_suggestion(site: Path) -> None:
    install(site, "some-things", "1", "[compress_ssl.things]\nlisted = photos:Listed\n")
    with pytest.raises(UserError, match="unknown thing 'listd'; did you mean 'listed'. Known: folder, .*, listed$"):
        registry().parse("listd:table=x.csv")


def test_a_built_in_kind_comes_before_one_of_a_package_and_the_clash_is_said(site: Path) -> None:
    install(site, "some-things", "1.0", "[compress_ssl.things]\ndigits = photos:Listed\npython = photos:Listed\n")
    things = registry()
    assert type(things.build("digits")).__name__ == "Digits" and things.kinds() == list(DATASETS.entries)
    assert things.problems() == [
        f"thing {kind!r} is the built-in one, not that of the package some-things 1.0 of the same name"
        for kind in ("digits", "python")
    ]


def test_a_kind_of_two_packages_is_refused_with_their_names(site: Path) -> None:
    for name in ("one", "two"):
        install(site, name, "3", "[compress_ssl.things]\nlisted = photos:Listed\n")
    assert registry().kinds() == list(DATASETS.entries)
    with pytest.raises(UserError, match="thing 'listed' is in several packages: one 3 and two 3; uninstall all but"):
        registry().parse("listed:table=x.csv")


def test_a_kind_whose_name_no_spec_can_have_is_named_in_the_listing(site: Path) -> None:
    install(site, "some-things", "1", "[compress_ssl.things]\n2 words = photos:Listed\n")
    assert registry().problems() == ["thing '2 words' of some-things 1 has no name that a spec can have"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("gone:Listed", "cannot be imported: ModuleNotFoundError: No module named 'gone'"),
        ("photos:Gone", "cannot be imported: AttributeError"),
        ("raises:Listed", r"cannot be imported: SystemExit: usage \(raises.py, line 2\); mend, upgrade or uninstall"),
        ("photos:UNREADABLE", "is a int, not a function or class"),
    ],
)
def test_a_package_that_cannot_be_imported_is_an_error_only_where_one_of_its_kinds_is_named(
    site: Path, value: str, message: str
) -> None:
    install(site, "some-things", "1.0", f"[compress_ssl.things]\nbroken = {value}\n")
    (site / "raises.py").write_text("import sys\nsys.exit('usage')\n")
    things = registry()
    assert things.build("digits") and things.kinds()[-1] == "broken"
    spec = things.parse("broken")
    with pytest.raises(UserError, match=f"thing 'broken' .* the package some-things 1.0.*{message}"):
        things.build(spec)


def test_the_listing_shows_a_broken_kind_and_goes_on(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "some-things", "1.0", "[compress_ssl.datasets]\nbroken = gone:Listed\ndigits = photos:Listed\n")
    monkeypatch.delitem(vars(DATASETS), "_entry_points", raising=False)
    monkeypatch.delitem(vars(DATASETS), "packages", raising=False)
    try:
        listed = listing.run(listing.Datasets())
    finally:
        del vars(DATASETS)["_entry_points"], vars(DATASETS)["packages"]
    assert "broken  [some-things 1.0]  cannot be used: " in listed["summary"]
    menu = listed["menu"]
    assert "No module named 'gone'" in menu["broken"]["summary"] and "split" in menu["digits"]["keys"]
    (problem,) = listed["problems"]
    assert problem.startswith("data 'digits' is the built-in one") and listed["summary"].endswith(problem)


def test_entry_points_are_not_read_for_a_built_in_kind_or_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images/train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def fail(**group: str) -> None:
        raise AssertionError("entry points were read")

    monkeypatch.setattr("importlib.metadata.entry_points", fail)
    things = Registry("thing", {**DATASETS.entries}, "folder", packages="compress_ssl.things")
    for text in ("digits", "digits:split=test", "./images", "images/train", "folder:images", "python:mine.py:X"):
        assert things.parse(text).kind in ("digits", "folder", "python")
    with pytest.raises(AssertionError, match="entry points were read"):
        things.parse("listed")


def test_a_positional_only_parameter_of_a_packages_function_takes_the_argument(site: Path) -> None:
    install(site, "some-things", "1.0", "[compress_ssl.things]\ntable = tables:table\n")
    (site / "tables.py").write_text(
        "from pathlib import Path\nfrom photos import Listed\n"
        "def table(file: Path, /, *, limit: int = 3):\n    return Listed(file, limit)\n"
    )
    things = registry()
    assert len(things.build("table:photos.csv,limit=2")) == 2  # type: ignore[arg-type]
    assert things.absolute_spec("table:photos.csv") == f"table:{site.parent}/photos.csv"
    for spec, message in {
        "table": "needs an argument: table:FILE",
        "table:x,y=2": "has no key 'y'. Known: limit",
    }.items():
        with pytest.raises(UserError, match=f"thing 'table' of some-things 1.0 {message}"):
            things.check(spec)


# ---------------------------------------------------------------- methods and models in training

BROKEN_METHOD = """
from torch import nn
from compress_ssl.pipeline.methods.base import Method
class Broken(Method):
    def __init__(self, *, context):
        super().__init__()
        self.head = nn.Linear(context.students[0].width, 1)
    def forward(self, batch, outputs):
        loss = self.head(outputs[0]["embedding"]).mean()
        BODY
    def after_step(self, batch):
        AFTER
class Fixed(nn.Module):
    preprocessing = {"size": 8, **EXTRA}
    def forward(self, images):
        return images.flatten(1)[:, :8]
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "store"
    spec = "convnet:channels=4+8,pretrained=false"
    flags: dict[str, Any] = {"views": 2, "image_size": 8, "limit": 20, "workers": 0, "device": "cpu"}
    export_teacher.run(export_teacher.Config("digits", spec, str(out), **flags))
    return out


def train_broken(
    teacher: Path, tmp_path: Path, body: str, after: str = "pass", extra: str = "{}", student: str = "convnet"
) -> None:
    file = tmp_path / "broken.py"
    file.write_text(BROKEN_METHOD.replace("BODY", body).replace("AFTER", after).replace("EXTRA", extra))
    flags: dict[str, Any] = {"steps": 2, "image_size": 8, "workers": 0, "device": "cpu"}
    words = (student.format(file),)
    distill.run(distill.Config(str(teacher), words, f"python:{file}:Broken", tmp_path / "run", **flags))


@pytest.mark.parametrize(
    ("body", "after", "message"),
    [
        ("return batch.nothing", "pass", r"Broken or its student failed: AttributeError.*\(broken.py, line 10\)"),
        ("return [loss]", "1 / 0", r"failed: ZeroDivisionError: division by zero \(broken.py, line 12\)"),
        ("return loss", "pass", "returned a Tensor; return a list with one loss for each of 1 students"),
        ("return [loss, loss]", "pass", "returned 2 losses; return a list"),
        ("return [loss.detach()]", "pass", "must be a scalar tensor with a gradient"),
        ("return [loss[None]]", "pass", r"returned a loss of shape \(1,\); each loss"),
        ("return [1.0]", "pass", "returned a float; each loss must be a scalar tensor"),
    ],
)
def test_what_is_wrong_with_a_users_method_in_training_is_said_in_words(
    body: str, after: str, message: str, teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train_broken(teacher, tmp_path, body, after)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("{}", "has no parameter that can be trained"),
        ('{"mean": (1, 2)}', "its attribute preprocessing is not valid: mean"),
        ('{"mean": 0.5}', "its attribute preprocessing is not valid: 'float' object is not iterable"),
        ('{"std": (0, 1, 1)}', "its attribute preprocessing is not valid: std"),
        ('{"size": "x"}', "its attribute preprocessing is not valid: size"),
        ('{"interpolation": "foo"}', "its attribute preprocessing is not valid: interpolation"),
    ],
)
def test_a_users_network_that_cannot_be_a_student_is_refused_with_the_cause(
    extra: str, message: str, teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train_broken(teacher, tmp_path, "return [loss]", extra=extra, student="python:{}:Fixed")


def test_a_listing_shows_defaults_as_they_are_typed() -> None:
    def default(config: object, kind: str, key: str) -> object:
        menu: Any = listing.run(config)["menu"]  # type: ignore[arg-type]
        return menu[kind]["keys"][key]

    assert default(listing.Models(), "convnet", "channels") == "16+32+64"
    assert default(listing.Methods(), "compress-2q", "bank") == "none"
    assert default(listing.Protocols(), "linear", "augment") == "false"
    assert default(listing.Protocols(), "classifier", "head") == "..."
