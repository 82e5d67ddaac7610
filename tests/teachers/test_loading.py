"""What is read of a teacher before anything is trained."""

import json
from pathlib import Path

import pytest
from tiny_pipelines import tiny_ddim

from fewstep.cli import main
from fewstep.fashion import teacher_path
from fewstep.teachers.license import teacher_license
from fewstep.teachers.loading import load_teacher
from fewstep.teachers.names import base_model, embedded_name, same_teacher

OTHER = {"license": "other", "license_name": "research", "license_link": "https://example.org"}


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\n---\n", {"license": "mit"}),
        ("---\nlicense: other\nlicense_name: research\nlicense_link: https://example.org\n---\n", OTHER),
        ("---\nlicense: [a\n---\n", {}),
        ("no front matter", {}),
    ],
)
def test_the_licence_is_what_the_card_says_and_a_broken_card_is_none(
    card: str, expected: dict[str, str], tmp_path: Path
):
    (tmp_path / "README.md").write_text(card)
    assert teacher_license(str(tmp_path)) == expected


def test_a_teacher_without_a_card_has_no_licence(tmp_path: Path):
    assert teacher_license(str(tmp_path)) == {}


def test_an_embedded_teacher_is_known_by_its_name_and_by_its_folder(tmp_path: Path):
    """A pipeline in memory says only where it was loaded from, and its guidance must be the stated one, not 7.5."""
    assert embedded_name("fashion-sd") == "fashion-sd"
    assert embedded_name(str(teacher_path("fashion-flow"))) == "fashion-flow"
    assert embedded_name(str(tmp_path)) is None
    assert embedded_name("owner/fashion-sd") is None


def test_a_card_tells_a_folder_from_the_embedded_teacher_of_its_name(tmp_path: Path):
    mine = tmp_path / "fashion-sd"
    mine.mkdir()
    assert embedded_name(str(mine)) is None
    assert base_model(str(mine)) == "./fashion-sd" == base_model("./fashion-sd")
    assert base_model("fashion-sd") == "fashion-sd" == base_model(str(teacher_path("fashion-sd")))
    assert base_model("owner/fashion-sd") == "owner/fashion-sd"
    assert base_model(str(tmp_path)) == tmp_path.name


def test_two_names_of_one_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By folders where both are here; a teacher that was moved is known by its name alone."""
    for folder in ("one/sd", "other/sd", "mine/fashion-sd"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "one")
    assert same_teacher("./sd", str(tmp_path / "one" / "sd"))
    assert not same_teacher(str(tmp_path / "one" / "sd"), str(tmp_path / "other" / "sd"))
    assert same_teacher("moved", str(tmp_path / "away" / "moved"))
    assert same_teacher("./fashion-sd", str(tmp_path / "mine" / "fashion-sd"))
    assert not same_teacher("fashion-sd", str(tmp_path / "mine" / "fashion-sd"))
    assert same_teacher("fashion-sd", str(teacher_path("fashion-sd")))
    assert same_teacher("owner/name", "owner/name") and not same_teacher("owner/name", "another/name")


# --- code of a teacher's own ---------------------------------------------------------------------------------------


def _with_code(folder: Path, where: str) -> Path:
    """A pipeline whose class, or whose network's class, stands in its own folder; running that code leaves a trace."""
    tiny_ddim().save_pretrained(folder)
    trace = folder / "was_run"
    index = json.loads((folder / "model_index.json").read_text())
    if where == "pipeline":
        index["_class_name"] = ["own_pipeline", "OwnPipeline"]
        file, base, imported = folder / "own_pipeline.py", "DDIMPipeline", "OwnPipeline"
    else:
        index["unet"] = ["own_unet", "OwnUNet"]
        file, base, imported = folder / "unet" / "own_unet.py", "UNet2DModel", "OwnUNet"
    (folder / "model_index.json").write_text(json.dumps(index))
    file.write_text(
        f"from pathlib import Path\nfrom diffusers import {base}\n\nPath({str(trace)!r}).touch()\n\n\n"
        f"class {imported}({base}):\n    pass\n"
    )
    return trace


@pytest.mark.parametrize("where", ["pipeline", "component"])
@pytest.mark.parametrize("command", ["probe", "distill", "sample", "eval"])
def test_code_in_a_folder_is_not_run_without_the_users_word(
    where: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "teacher"
    trace = _with_code(folder, where)
    words = {
        "probe": ["probe", str(folder)],
        "distill": ["distill", "dmd2", "--teacher", str(folder), "--out", str(tmp_path / "out"), "--cpu"],
        "sample": ["sample", str(folder), "--steps", "1", "--out", str(tmp_path / "a.png")],
        "eval": ["eval", "--teacher", str(folder), "--out", str(tmp_path / "report"), str(folder)],
    }
    assert main(words[command]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fewstep: ")]
    assert len(lines) == 1 and not trace.exists()
    if command in ("probe", "distill"):
        assert "holds code of its own, which was not run" in lines[0] and "--trust_remote_code" in lines[0]


@pytest.mark.parametrize("where", ["pipeline", "component"])
def test_code_in_a_folder_is_run_with_the_users_word(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trace = _with_code(tmp_path / "teacher", where)
    pipeline = load_teacher(str(tmp_path / "teacher"), trust_remote_code=True)
    assert trace.exists()
    assert type(pipeline if where == "pipeline" else pipeline.unet).__name__.startswith("Own")


@pytest.mark.parametrize("where", ["pipeline", "component"])
def test_a_student_that_could_not_be_loaded_is_refused_before_its_training(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    _with_code(tmp_path / "teacher", where)
    words = ["distill", "dmd2", "--teacher", str(tmp_path / "teacher"), "--out", str(tmp_path / "out"), "--cpu"]
    assert main([*words, "--trust_remote_code", "--report_to", "none"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fewstep: ")]
    assert len(lines) == 1 and "cannot be written as a whole pipeline" in lines[0]
    assert not (tmp_path / "out" / "checkpoints").exists()
