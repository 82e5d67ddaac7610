"""What docs/runtimes.md says is tested: a student, or what one is made of, in other hands than a stock pipeline's."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, ModularPipeline
from tiny_pipelines import tiny_stable_diffusion

from fewstep.fashion import PROMPTS, teacher_path

pytestmark = pytest.mark.runtime

PAGE = Path(__file__).resolve().parents[2] / "docs" / "runtimes.md"
KNOWN = {"tested", "tested where it is installed", "measured once", "not run", "no"}


def rows():
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def row(start):
    (found,) = [cells for cells in rows() if cells[0].startswith(start)]
    return found


def loaded(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_every_row_says_how_it_is_known():
    assert rows() and all(len(cells) == 4 for cells in rows())
    assert {cells[2] for cells in rows()} <= KNOWN
    named = [cells for cells in rows() if cells[2] in ("tested", "measured once")]
    assert all(re.search(r"\d", cells[1]) for cells in named), "without versions a result means nothing"
    assert row("ComfyUI")[2] == "not run"


def test_a_modular_pipeline_gives_the_students_pictures_once_its_guider_is_off(request):
    zoo = request.config.getoption("zoo")
    if not zoo or not (zoo / "StableDiffusionXL").is_dir():
        pytest.skip("no folder of tiny pipelines: give --zoo DIR")
    folder = zoo / "StableDiffusionXL"
    stock, modular = loaded(folder), ModularPipeline.from_pretrained(str(folder))
    modular.load_components(
        names=["unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"]
    )
    calls = []
    modular.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    call = {"prompt": "a b lower", "num_inference_steps": 4, "height": 64, "width": 64, "output_type": "pt"}

    def picture(pipeline, **more):
        return pipeline(**call, **more, generator=torch.Generator().manual_seed(0)).images

    picture(modular, guidance_scale=1.0)
    assert len(calls) == 8, "it guides, whatever the call says"
    modular.update_components(guider=modular.guider.new(guidance_scale=1.0))
    calls.clear()
    assert torch.equal(picture(modular), picture(stock, guidance_scale=1.0))
    assert len(calls) == 4


@pytest.mark.soak
def test_an_exported_unet_takes_a_batch_of_63_and_no_more():
    unet = tiny_stable_diffusion().unet

    def inputs(batch):
        return torch.randn(batch, 4, 8, 8), torch.full((batch,), 500), torch.randn(batch, 6, 16)

    def export(largest):
        batch = {0: torch.export.Dim("batch", max=largest)}
        dynamic = {"sample": batch, "timestep": batch, "encoder_hidden_states": batch, "return_dict": None}
        how = {"dynamic_shapes": dynamic, "strict": False}
        return torch.export.export(unet, inputs(2), {"return_dict": False}, **how).module()

    exported = export(63)
    with torch.no_grad():
        for batch in (1, 63):
            given = inputs(batch)
            assert torch.equal(exported(*given, return_dict=False)[0], unet(*given, return_dict=False)[0])
    with pytest.raises(torch._dynamo.exc.UserError, match="<= 63"):
        export(64)


@pytest.mark.parametrize(("teacher", "component"), [("fashion-sd", "unet"), ("fashion-flow", "transformer")])
def test_fp8_storage_changes_pictures_by_what_the_page_says(teacher, component):
    pipeline = loaded(teacher_path(teacher))

    def pictures():
        call = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "pt"}
        return pipeline(list(PROMPTS[:2]), generator=torch.Generator().manual_seed(0), **call).images

    before = pictures()
    getattr(pipeline, component).enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )
    change = float((pictures() - before).norm() / before.norm())
    stated = re.search(rf"([\d.]+) % for `{teacher}`", row("fp8")[3])
    assert stated is not None and abs(100 * change - float(stated[1])) < 1


def test_onnx_runtime_encodes_as_the_text_encoder_does(tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript, which torch exports with, is not installed")
    encoder = loaded(teacher_path("fashion-sd")).text_encoder
    tokens = torch.zeros(1, 77, dtype=torch.long)
    torch.onnx.export(encoder, (tokens,), tmp_path / "encoder.onnx", dynamo=True)
    session = runtime.InferenceSession(str(tmp_path / "encoder.onnx"))
    (name,) = [one.name for one in session.get_inputs()]
    answer = session.run(None, {name: tokens.numpy()})[0]
    with torch.no_grad():
        assert np.abs(answer - encoder(tokens).last_hidden_state.numpy()).max() < 1e-4
