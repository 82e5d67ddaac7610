"""A disk that is full at every kind of file of a run, one after the other: one line, exit code 2, and nothing lost."""

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fewstep.cli import main
from fewstep.errors import of_the_system
from fewstep.training import checkpoint
from tests import tiny_pipelines
from tests.faults import faults

#: What there is no room for -> the step of the newest checkpoint that is there then.
FULL = {
    "config.yaml": None,
    "inputs.json": None,
    "pairs/.about.json": None,
    "pairs/.shard": None,
    "checkpoints/.partial_00000000": None,
    "metrics.jsonl": 0,
    "checkpoints/.partial_00000002": 0,
    "samples": 2,
    "checkpoints/.partial_00000003": 2,
    ".student.partial/unet/diffusion": 3,
    ".student.partial/README.md": 3,
}


#: The cheap form.
SOME = ("metrics.jsonl", "samples", ".student.partial/unet/diffusion")


@pytest.mark.parametrize("names", [SOME, pytest.param(tuple(FULL), marks=pytest.mark.soak)], ids=["some", "all"])
def test_a_full_disk_is_one_line_at_every_file_and_the_run_goes_on(
    names: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_pipelines.tiny_ddim().save_pretrained(tmp_path / "teacher")
    settings = "--max_steps 3 --batch_size 1 --num_pairs 3 --log_steps 1 --checkpointing_steps 2 --sample_steps 3 --cpu"
    words = [
        "distill",
        "rectified_flow",
        "--teacher",
        str(tmp_path / "teacher"),
        "--report_to",
        "none",
        *settings.split(),
    ]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    capsys.readouterr()
    out, resume = tmp_path / "out", []
    for name in names:
        with faults(out, 1, "full", on=name) as fault:
            assert main([*words, "--out", str(out), *resume]) == 2, name
        assert fault.happened
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fewstep: ")]
        assert len(said) == 1 and "No space left on device" in said[0] and "--resume" in said[0], name
        resume = ["--resume"] if (out / "config.yaml").exists() else []
        if (kept := FULL[name]) is not None:
            found = checkpoint.find_latest(out / "checkpoints")
            assert (found.state["step"], found.note) == (kept, ""), name
        assert not (out / "student").exists()
    assert main([*words, "--out", str(out), "--resume"]) == 0
    weights = "student/unet/diffusion_pytorch_model.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    assert _rows(out) == _rows(tmp_path / "whole")
    assert _names(out) == _names(tmp_path / "whole")


def test_what_safetensors_says_of_a_full_disk_is_the_systems_word(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # no file may grow beyond, as on a full disk
    try:
        with pytest.raises(SafetensorError) as caught:
            save_file({"w": torch.zeros(10_000)}, tmp_path / "w.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert of_the_system(caught.value)


def _rows(out: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def _names(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*")}
