"""A sharded run, through to a student that stock diffusers loads; and runs that are refused."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from fewstep.cli import main
from fewstep.errors import UserError
from fewstep.programs.distillation import prepare
from fewstep.programs.methods import method_class
from fewstep.programs.workbench import open_workbench
from fewstep.training.checkpoint import find_latest
from tests import tiny_pipelines
from tests.forked import forked

SHARDED = (
    "--sharding full --lora_rank 2 --ema_decay 0.5 --steps 2 --max_steps 2 --critic_updates 1 --batch_size 2 --lr 1e-3"
)


def test_a_sharded_lora_run_ends_in_what_stock_diffusers_loads(tmp_path: Path) -> None:
    teacher, out, prompts = tmp_path / "teacher", tmp_path / "out", tmp_path / "prompts.txt"
    tiny_pipelines.tiny_flow().save_pretrained(teacher)
    prompts.write_text("red shoe\nold hat")
    words = ["distill", "dmd2", "--teacher", str(teacher), "--out", str(out), "--prompts", str(prompts)]
    words += [*SHARDED.split(), "--report_to", "none", "--cpu", "true"]
    for end in forked(2, lambda _rank: main(words), tmp_path / "said"):
        assert end.code == 0, end.said[-4000:]

    found = find_latest(out / "checkpoints")
    assert found.state["step"] == 2 and all(name.endswith(".safetensors") for name in found.state["files"])
    average = found.tensors()["ema"]
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    pipeline.load_lora_weights(out / "student_lora")
    layer = "transformer_blocks.0.attn.to_q"
    (loaded,) = pipeline.transformer.get_submodule(layer).lora_B.values()
    assert torch.equal(loaded.weight, average[f"adapter.{layer}.lora_B.weight"]) and loaded.weight.any()
    assert (out / "samples").is_dir()


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("mean_flow", {"apart": 0.5}, "its processes would not make the same network calls"),
        ("any_flow", {}, "its processes would not make the same network calls"),
        ("twin_flow", {}, "its processes would not make the same network calls"),
        ("phased_dmd", {"lora_rank": 2, "full_critic": True}, "a full critic that starts over"),
    ],
)
def test_what_cannot_be_divided_is_refused_before_training(
    tmp_path: Path, method: str, settings: dict, message: str
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red shoe\nold hat")
    config = method_class(method).Config(
        teacher="tiny", out=str(tmp_path / "out"), steps=2, prompts=str(prompts), sharding="full", **settings
    )
    bench = open_workbench(config, "cpu", tiny_pipelines.tiny_flow())
    with pytest.raises(UserError, match=message) as caught:
        prepare(bench, method)
    assert "\n" not in str(caught.value)
