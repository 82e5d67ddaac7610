"""Publishing a student: what is uploaded where, and that a hub which does not take it costs nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from tiny_pipelines import tiny_stable_diffusion

from fewstep.cli import main
from fewstep.config.run import RunConfig
from fewstep.errors import UserError
from fewstep.programs.distillation import distill

SETTINGS = {"steps": 1, "max_steps": 1, "batch_size": 1, "report_to": "none", "cpu": True, "sample_steps": 0}


class Hub:
    """Keeps what would have been uploaded: repository -> (private, file -> content)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.private: dict[str, Any] = {}
        self.files: dict[str, dict[str, bytes]] = {}

        def create_repo(_api: Any, repo_id: str, *, private: Any = None, exist_ok: bool = False) -> Any:
            assert exist_ok
            self.private[repo_id] = private
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(_api: Any, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
            files = (path for path in Path(folder_path).rglob("*") if path.is_file())
            self.files[repo_id] = {str(path.relative_to(folder_path)): path.read_bytes() for path in files}

        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
        monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    return str(tmp_path / "prompts.txt")


def test_both_forms_are_uploaded_with_their_cards(
    prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch)
    words = {**SETTINGS, "prompts": prompts, "lora_rank": 2, "merge": True}
    out = tmp_path / "run"
    distill(tiny_stable_diffusion(), "dmd2", out=str(out), push_to_hub="me/mine", hub_private=True, **words)
    assert hub.private == {"me/mine": True, "me/mine-lora": True}
    assert {"model_index.json", "fewstep.json", "README.md"} <= hub.files["me/mine"].keys()
    assert {"pytorch_lora_weights.safetensors", "fewstep.json", "README.md"} <= hub.files["me/mine-lora"].keys()
    for name, form in (("me/mine", "student"), ("me/mine-lora", "student_lora")):
        card = hub.files[name]["README.md"].decode()
        assert f'"{name}"' in card and "path/to/this/folder" not in card
        assert (out / form / "README.md").read_text() == card
        assert "me/mine" not in hub.files[name]["fewstep.json"].decode()


def test_a_form_that_a_resumed_run_no_longer_has_is_neither_kept_nor_returned_nor_published(
    prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``merge`` may change on --resume; the whole pipeline of before would be a student of fewer steps."""
    hub = Hub(monkeypatch)
    words = {**SETTINGS, "prompts": prompts, "lora_rank": 2, "out": str(tmp_path / "run")}
    pipeline = tiny_stable_diffusion()
    assert distill(pipeline, "dmd2", **words, merge=True) == tmp_path / "run" / "student"
    (tmp_path / "run" / "notes").mkdir()
    again = distill(pipeline, "dmd2", **{**words, "max_steps": 2}, resume=True, push_to_hub="me/mine")
    assert again == tmp_path / "run" / "student_lora"
    assert not (tmp_path / "run" / "student").exists() and (tmp_path / "run" / "notes").is_dir()
    assert hub.files.keys() == {"me/mine"} and "pytorch_lora_weights.safetensors" in hub.files["me/mine"]


def test_a_hub_that_fails_is_one_line_and_the_student_stays(
    prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_stable_diffusion().save_pretrained(tmp_path / "base")
    out = tmp_path / "run"
    words = ["distill", "dmd2", "--teacher", str(tmp_path / "base"), "--out", str(out), "--prompts", prompts, "--cpu"]
    words += ["--steps", "1", "--max_steps", "1", "--batch_size", "1", "--report_to", "none", "--lora_rank", "2"]
    assert main([*words, "--push_to_hub", "me/mine"]) == 2  # offline
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fewstep: ")]
    assert len(lines) == 1 and "the hub did not take me/mine" in lines[0] and str(out / "student_lora") in lines[0]
    before = (out / "student_lora" / "README.md").read_text()
    assert "path/to/this/folder" in before and (out / "student_lora" / "pytorch_lora_weights.safetensors").is_file()
    hub = Hub(monkeypatch)
    assert main([*words, "--push_to_hub", "me/mine", "--resume"]) == 0
    assert hub.private == {"me/mine": None} and "fewstep.json" in hub.files["me/mine"]


def test_names_that_are_none(tmp_path: Path) -> None:
    for name in ("a/b/c", "", "a b", "/x"):
        with pytest.raises(UserError, match="--push_to_hub takes owner/name" if name else "--push_to_hub is empty"):
            RunConfig(teacher="t", out=str(tmp_path), push_to_hub=name)
    with pytest.raises(UserError, match="--hub_private belongs to --push_to_hub"):
        RunConfig(teacher="t", out=str(tmp_path), hub_private=True)
