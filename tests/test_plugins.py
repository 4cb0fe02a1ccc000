"""Data sets, models and methods of a user's own: the examples of docs/plugins.md, by place and as a package."""

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compress_ssl.pipeline.datasets import DATASETS
from compress_ssl.pipeline.datasets.base import content_hash
from compress_ssl.pipeline.datasets.decode import BROKEN, BadImage
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.storage import open_storage
from compress_ssl.pipeline.store.feature_store import FeatureStore
from compress_ssl.stages import distill, export_teacher, verify

PAGE = (Path(__file__).parents[1] / "docs" / "plugins.md").read_text()
CPU = {"device": "cpu", "workers": 0}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


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
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_photos.py"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout


def test_dask_workers_load_a_data_set_from_a_users_file(home: Path) -> None:
    export_teacher.run(
        export_teacher.Config(
            "python:photos.py:Listed,table=photos.csv", "python:nets.py:tiny", "store", views=1, scheduler="processes:1"
        )
    )
    assert (FeatureStore(open_storage("store")).table("status") == 0).all()


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
        f"{mine}:labelled": r"KeyError: 'row 2' \(mine.py, line 14\)",
        f"{mine}:Fails": r"AttributeError: 'Fails' object has no attribute 'server' \(mine.py, line 31\)",
        f"{mine}:Floats": r"returned float64 \(8, 8, 3\) as pixels",
    }.items():
        with pytest.raises(BadImage, match=message) as caught:
            DATASETS.build(spec).load(2)
        assert caught.value.status == BROKEN


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("words", "its attribute targets must have one whole number per image"),
        ("short", "its attribute targets must have one whole number per image"),
        ("nothing", "returned a NoneType without __len__ and __getitem__"),
        ("arrays", r"it is a ndarray of float32 \(3, 8, 8\): take out transforms such as ToTensor"),
        ("broken", r"python:mine.py:broken failed: RuntimeError: no server \(mine.py, line 24\)"),
        ("empty", "has no images"),
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
    with pytest.raises(UserError, match=r"changed_rows of python:mine.py:Fails failed: .* \(mine.py, line 33\)"):
        DATASETS.build(f"{mine}:Fails").subset(1).changed_rows(np.zeros(1, np.uint64), 0.0)
