"""The documents' main path in short: the demo, and the Python around it, word for word but for sizes and paths."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fewstep.cli import main
from fewstep.eval import speed
from fewstep.fashion import teacher_path

pytestmark = pytest.mark.usefixtures("with_relatives")

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


@pytest.fixture(scope="module", autouse=True)
def in_short() -> Iterator[None]:
    """Each row is timed once, in place of several times."""
    side_by_side = speed.side_by_side

    def once(calls, **options):
        return side_by_side(calls, **{**options, "rounds": 1, "warm_up": False})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "side_by_side", once)
        yield


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "demo-fashion-sd"
    assert main(["demo", "--out", str(out), "--max_steps", "1", "--num", "20"]) == 0
    return out


def test_the_demo_ends_in_a_student_a_report_and_pictures(demo: Path) -> None:
    report = json.loads((demo / "report" / "report.json").read_text())
    shown = [(row["model"], row["steps"], row["nfe"]) for row in report["rows"]]
    teacher = [("teacher fashion-sd", steps, 2 * steps) for steps in (1, 2, 4, 25)]
    assert shown == [*teacher, ("student", 1, 1), ("student", 2, 2), ("student", 4, 4)]
    for row in report["rows"]:
        assert {"fd_test", "agreement", "recall"} <= row["metrics"].keys()
    assert report["measures"]["fd_test"]["floor"] > 0
    for picture in ("report/grid.png", "samples/step_00000001.png"):
        assert (demo / picture).read_bytes()[:4] == b"\x89PNG"
    assert "teacher" in (demo / "report" / "report.md").read_text()
    related = json.loads((demo / "student" / "fewstep.json").read_text())["related"]
    assert related["StableDiffusionImg2ImgPipeline"]["counts"].keys() == {"1", "2", "4"}


@pytest.mark.soak
def test_a_finished_demo_trains_no_further(demo: Path) -> None:
    before = (demo / "metrics.jsonl").read_text()
    assert main(["demo", "--out", str(demo), "--max_steps", "1", "--num", "20"]) == 0
    assert (demo / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("documents", [DOCUMENTS[:1], pytest.param(DOCUMENTS[1:], marks=pytest.mark.soak)])
def test_the_documents_python_runs(
    documents: tuple[Path, ...], demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in documents}
    blocks = [(path, block) for path in texts for block in re.findall(r"```python\n(.*?)```", texts[path], re.DOTALL)]
    assert {path.name for path, _ in blocks} >= ({"README.md"} if len(documents) == 1 else {"distill.md", "sample.md"})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("demo-fashion-sd", "first", "mine"):
        (tmp_path / "runs" / name).symlink_to(demo)
    if any("my-fine-tune" in block for _, block in blocks):
        # What is plugged into, and what is plugged in: any pipeline of that network, and a student of speed_up_net.
        (tmp_path / "my-fine-tune").symlink_to(teacher_path("fashion-sd"))
        plugged = ["speed_up_net", "--teacher", "fashion-sd", "--out", "runs/sun", "--max_steps", "1"]
        assert main(["distill", *plugged, "--batch_size", "8", "--sample_steps", "0"]) == 0
    asked = {"tag": "single_object", "include": [{"class": "boot", "count": 1}], "prompt": "a photo of an ankle boot"}
    (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps(asked) + "\n")
    for path, block in blocks:
        short = re.sub(r"max_steps=\d+", "max_steps=1", re.sub(r"num=\d+", "num=20", block))
        short = re.sub(r"batch_size=\d+", "batch_size=8", short)
        exec(compile(short, str(path), "exec"), {})
