"""A network in half precision is what diffusers loads in half precision."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from tiny_pipelines import WAN_CALL, dense_wan

from fewstep.networks.in_dtype import in_dtype
from fewstep.programs.methods import method_class
from fewstep.programs.workbench import open_workbench
from fewstep.recording.watch.shake import shaken


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> WanPipeline:
    """Its class keeps the time embedder, norms and tables in float32; its rotary positions lie in no file."""
    pipeline = dense_wan()
    with shaken(pipeline.transformer):
        own = copy.deepcopy(pipeline.transformer)
    pipeline.transformer = own
    return pipeline


def dtypes(network: torch.nn.Module) -> dict[str, torch.dtype]:
    return {name: value.dtype for name, value in (*network.named_parameters(), *network.named_buffers())}


def test_it_is_what_diffusers_loads_to_the_bit(wan: WanPipeline, tmp_path: Path) -> None:
    wan.transformer.save_pretrained(tmp_path)
    theirs = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    ours = in_dtype(copy.deepcopy(wan.transformer), torch.bfloat16)
    assert dtypes(ours) == dtypes(theirs)
    assert set(dtypes(ours).values()) == {torch.float32, torch.bfloat16}
    assert dtypes(copy.deepcopy(wan.transformer).to(torch.bfloat16)) != dtypes(theirs), "nn.Module.to heeds nothing"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, wan.transformer.config.in_channels, 3, 8, 8, generator=generator).bfloat16()
    told = torch.randn(2, 5, wan.transformer.config.text_dim, generator=generator).bfloat16()
    with torch.no_grad():
        answers = [net(x, torch.tensor([700.0, 20.0]), told, return_dict=False)[0] for net in (ours, theirs)]
    assert torch.equal(*answers)


def test_other_precisions_are_whole(wan: WanPipeline) -> None:
    """Nothing is kept below what is asked for."""
    assert set(dtypes(in_dtype(copy.deepcopy(wan.transformer), torch.float64)).values()) == {torch.float64}
    assert set(dtypes(in_dtype(copy.deepcopy(wan.transformer), torch.float32)).values()) == {torch.float32}


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_run_in_bfloat16_reads_that_network(wan: WanPipeline, lora_rank: int, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    told = {"prompts": str(tmp_path / "prompts.txt"), "call": WAN_CALL, "lora_rank": lora_rank, "cpu": True}
    config = method_class("dmd2").Config(teacher="t", out=str(tmp_path), mixed_precision="bf16", **told)
    teacher = open_workbench(config, "cpu", wan).make_roles("student")["teacher"].denoiser.network
    expected = dtypes(in_dtype(copy.deepcopy(wan.transformer), torch.bfloat16))
    read = dtypes(teacher)
    assert {name: read[name] for name in expected if name in read} == {n: expected[n] for n in expected if n in read}
    assert read["scale_shift_table"] == read["rope.freqs_cos"] == torch.float32
    assert read["patch_embedding.weight"] == torch.bfloat16
