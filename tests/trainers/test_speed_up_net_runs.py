"""SpeedUpNet on stock pipelines: where the adapter sits, what a run writes, the same adapter on a fine-tuned copy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import tiny_ddim, tiny_dit, tiny_flow, tiny_stable_diffusion
from torch import Tensor

import fewstep
from fewstep.conditioning.ragged import with_others
from fewstep.diffusion.draws import Draws
from fewstep.errors import UserError
from fewstep.eval.plugged import Plugged, main, table
from fewstep.export.errors import ExportError
from fewstep.networks.make_roles import RoleSettings
from fewstep.networks.speed_up import SPEED_UP, SpeedUpDenoiser, SpeedUpRecipe, plugged_roles, refuse_unlike
from fewstep.programs.distillation import distill, prepare
from fewstep.programs.methods import method_class
from fewstep.programs.workbench import open_workbench
from fewstep.recording import record
from fewstep.recording.watch.shake import shaken
from fewstep.training.initialization import initialize
from tests.checkpoints import load_latest
from tests.stock_process import sample_stock

RUN = {"steps": 2, "max_steps": 2, "batch_size": 2, "num_pairs": 4, "pair_steps": 2, "solver_steps": 2, "lr": 1e-2}
RUN |= {"sample_steps": 0, "report_to": "none", "cpu": True, "guidance_scale": 3.0, "ema_decay": 0.5}
FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "cross attention": (tiny_stable_diffusion, {}),
    "joint attention": (tiny_flow, {"max_sequence_length": 8}),
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a cat\na dog\n")
    return str(path)


@pytest.fixture(scope="module")
def student(prompts: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of Stable Diffusion."""
    out = tmp_path_factory.mktemp("run")
    return distill(tiny_stable_diffusion(), "speed_up_net", out=str(out), prompts=prompts, **RUN)


def latents(pipeline: Any, seed: int = 5, **words: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    made: Tensor = pipeline(
        "a cat", output_type="latent", generator=torch.Generator().manual_seed(seed), **words
    ).images
    return made


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_begins_as_the_identity_and_learns_from_both_prompts(family: str, rank: int):
    make, call = FAMILIES[family]
    pipeline = make()
    recording = record(pipeline, **call)
    told = with_others(recording.condition(["a cat", "a dog"]), [recording.negative().select([0, 0])])
    draws = Draws(0, 0, range(2))
    samples = draws.normal("x", recording.sample_shape), torch.full((2,), 0.5, dtype=torch.float64), told
    settings = RoleSettings(lora_rank=rank, gradient_checkpointing=True)
    roles = plugged_roles(settings, recording, samples, torch.device("cpu"))
    refuse_unlike(roles, samples)
    student = roles["student"].denoiser
    assert isinstance(student, SpeedUpDenoiser)
    assert len(student.adapter.names) > 1
    x, t, _ = samples
    plain = roles["teacher"](x, t, told)
    moved = roles["student"](x, t, told)
    assert not torch.allclose(moved, plain)
    moved.square().mean().backward()  # blocks run again in it, under the adapter
    again = {name: p.grad.clone() for name, p in roles["student"].named_parameters() if p.grad is not None}
    assert all(value.isfinite().all() for value in again.values())
    for side in ("negative", "positive"):
        assert any(f".{side}." in name and value.abs().max() > 0 for name, value in again.items())
    assert all(p.grad is None for p in student.network.parameters())
    assert torch.equal(roles["teacher"](x, t, told), plain)
    for part in student.network.modules():  # the same gradient where nothing runs again
        if hasattr(part, "gradient_checkpointing"):
            part.gradient_checkpointing = False
    roles["student"].single.added["speed_up"].zero_grad()
    roles["student"](x, t, told).square().mean().backward()
    for name, parameter in roles["student"].named_parameters():
        if name in again:
            torch.testing.assert_close(parameter.grad, again[name], rtol=1e-4, atol=1e-7)


def test_the_student_is_its_teacher_and_an_adapter_and_loads_stock(student: Path, tmp_path: Path):
    pipeline, teacher = fewstep.load(student), tiny_stable_diffusion()
    assert (student / "speed_up.py").is_file() and (student / "speed_up" / "speed_up.py").is_file()
    theirs = teacher.unet.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in pipeline.unet.state_dict().items())
    ours = latents(pipeline)
    (stock,) = sample_stock(tmp_path / "stock.npz", student)
    torch.testing.assert_close(stock.latents[2], ours, rtol=1e-4, atol=1e-5)
    assert stock.called[2] == ["unet"] * 2  # guidance costs nothing


@pytest.mark.filterwarnings("error:this student has its guidance")
def test_a_negative_prompt_is_heeded_and_the_usual_one_is_that_of_the_run(student: Path):
    pipeline = fewstep.load(student)
    plain, away = latents(pipeline), latents(pipeline, negative_prompt="a dog")
    torch.testing.assert_close(latents(pipeline, negative_prompt=""), plain)
    assert (away - plain).abs().max() > 1e-4
    torch.testing.assert_close(latents(pipeline, negative_prompt=["a dog"]), away)
    two = latents(pipeline, negative_prompt="a dog", num_images_per_prompt=2)
    assert two.shape[0] == 2


def test_the_adapter_is_plugged_into_a_fine_tuned_copy_and_saved_as_a_stock_pipeline(student: Path, tmp_path: Path):
    tuned = tiny_stable_diffusion()
    with shaken(tuned.unet):
        quick = fewstep.plug(tuned, student)
        ours, away = latents(quick), latents(quick, negative_prompt="a dog")
        assert (ours - latents(fewstep.load(student))).abs().max() > 1e-3  # the copy's own weights
        assert (ours - away).abs().max() > 1e-4
        quick.save_pretrained(tmp_path / "quick")
        assert "speed_up" not in tuned.components
    torch.testing.assert_close(latents(fewstep.load(tmp_path / "quick")), ours, rtol=1e-4, atol=1e-5)
    (stock,) = sample_stock(tmp_path / "stock.npz", tmp_path / "quick")
    torch.testing.assert_close(stock.latents[2], ours, rtol=1e-4, atol=1e-5)


def test_a_student_is_held_against_the_adapter_of_its_files(student: Path):
    pipeline = tiny_stable_diffusion()
    quick = fewstep.plug(pipeline, student)
    recording = record(pipeline)
    recipe = SpeedUpRecipe(recording.recipe, quick.speed_up)
    told, x, t = recording.condition(["a cat"]), torch.randn(1, *recording.sample_shape), torch.tensor([500.0])
    rounded = copy.deepcopy(quick.speed_up).half().float()
    ours, theirs = (
        one.call(pipeline.unet, x, t, told) for one in (recipe.calling({SPEED_UP: rounded}), recipe.calling({}))
    )
    assert not torch.equal(ours, theirs)
    assert torch.equal(ours, SpeedUpRecipe(recording.recipe, rounded).call(pipeline.unet, x, t, told))
    assert torch.equal(theirs, recipe.call(pipeline.unet, x, t, told))


def test_what_the_adapter_does_not_fit_is_refused(student: Path, tmp_path: Path):
    with pytest.raises(ExportError, match="of another pipeline than StableDiffusion3Pipeline"):
        fewstep.plug(tiny_flow(), student)
    other = tiny_stable_diffusion()
    other.unet = type(other.unet).from_config(other.unet.config, block_out_channels=(8, 32))
    with pytest.raises(ExportError, match="is another network than that of"):
        fewstep.plug(other, student)
    with pytest.raises(ExportError, match="there is no folder"):
        fewstep.plug(other, tmp_path / "nothing")
    code = student / "speed_up" / "speed_up.py"
    written = code.read_text()
    try:
        code.write_text(written + "\nprint('mine')\n")
        with pytest.raises(ExportError, match="does not load"):
            fewstep.load(student)
    finally:
        code.write_text(written)


def test_a_second_run_starts_from_the_adapter_of_the_first_and_from_nothing_else(
    student: Path, prompts: str, tmp_path: Path
):
    pipeline, init = tiny_stable_diffusion(), str(student.parent)
    settings = method_class("speed_up_net").Config(teacher="t", out=str(tmp_path), prompts=prompts, init=init, **RUN)
    bench = open_workbench(settings, "cpu", pipeline)
    (_, tensors), taken = load_latest(student.parent / "checkpoints"), prepare(bench, "speed_up_net").roles["student"]
    assert all(torch.equal(value, tensors["student"][name]) for name, value in taken.state_dict().items())
    assert any(name.startswith("speed_up.") for name in tensors["student"])
    pipeline.save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match="plain has no adapter of speed_up_net"):
        initialize({"student": taken}, str(tmp_path / "plain"), bench.recording, print)


def test_a_student_of_joint_attention_with_low_rank_loads_stock(prompts: str, tmp_path: Path):
    settings = {**RUN, "lora_rank": 2, "ema_decay": 0.0, "call": {"max_sequence_length": 8}}
    folder = distill(tiny_flow(), "speed_up_net", out=str(tmp_path / "run"), prompts=prompts, **settings)
    ours = latents(fewstep.load(folder))
    (stock,) = sample_stock(tmp_path / "stock.npz", folder)
    torch.testing.assert_close(stock.latents[2], ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (tiny_ddim, {}, "stands for guidance, which this teacher lacks"),
        (tiny_dit, {"classes": "0-2", "guidance_scale": 3.0}, "has no attention to a text's tokens"),
        (tiny_stable_diffusion, {"guidance_scale": 1.0, "prompts": True}, "--guidance_scale 1 is none"),
    ],
)
def test_teachers_without_guidance_or_text_are_refused(
    make: Callable[[], DiffusionPipeline], settings: dict[str, Any], message: str, prompts: str, tmp_path: Path
):
    settings = {**RUN, "guidance_scale": None, **settings} | ({"prompts": prompts} if "prompts" in settings else {})
    with pytest.raises(UserError, match=message):
        distill(make(), "speed_up_net", out=str(tmp_path / "run"), **settings)


def test_the_program_of_the_fine_tuned_copy_says_what_it_cannot_do(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for words, message in (
        ([str(student), "--out", str(tmp_path)], "is no student of speed_up_net and fashion-sd"),
        ([str(student), "--out", str(student)], "is not empty"),
        ([str(student), "--out", str(tmp_path), "--num", "1"], "--num must be at least 2"),
        ([str(tmp_path / "none"), "--out", str(tmp_path)], "there is no folder"),
    ):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and message in said and said.count("\n") == 1
    rows = [Plugged("copy", 25, 0.5, 0.9), Plugged("copy with the adapter", 4, 0.6, 0.8)]
    assert table(rows).splitlines()[-1] == "| copy with the adapter | 4 | 0.600 | 1.20 | 0.800 |"
