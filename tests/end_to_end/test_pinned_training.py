"""Teachers that pin what a picture says between their steps, distilled: the student's stock pipeline pins it too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from pinned_pipelines import a_first_frame, a_kept_region
from safetensors.torch import load_file
from torch import Tensor

from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.programs.distillation import distill
from fewstep.recording import record
from fewstep.recording.watch.observe import observe

pytestmark = [pytest.mark.soak, pytest.mark.usefixtures("texts_as_they_are")]
SHORT = {"steps": 2, "max_steps": 2, "batch_size": 2, "lr": 1e-3, "cpu": True, "report_to": "none", "sample_steps": 2}
METHODS: dict[str, dict[str, Any]] = {
    "dmd2": {"critic_updates": 1},
    "rectified_flow": {"num_pairs": 2, "pair_steps": 2, "lora_rank": 4},
}


def _decoded(pipeline: Any, item: dict[str, Any], about: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The first sample of a stock pipeline's walk, and what its decoder is given."""
    arguments = {**item, **about["call"], "generator": torch.Generator().manual_seed(0)}
    seen = observe(pipeline, arguments, stop_at_decode=True)
    assert len(seen.steps) == about["steps"] and seen.decoder_input is not None
    return seen.steps[0].sample, seen.decoder_input


@pytest.mark.parametrize("made", [a_first_frame, a_kept_region])
@pytest.mark.parametrize("method", METHODS)
def test_students_pin_what_their_teachers_pin(made: Any, method: str, tmp_path: Path) -> None:
    pipeline, items, call = made()
    pipeline.save_pretrained(tmp_path / "teacher")
    settings = {**SHORT, **METHODS[method], "call": call, "renoise": "ode"}
    folder = distill(str(tmp_path / "teacher"), method, items=items, out=tmp_path / "run", **settings)
    about = json.loads((folder / "fewstep.json").read_text())
    assert len(list((tmp_path / "run").glob("samples/*.png"))) >= 1

    recording = record(pipeline, items=items, **call)
    if "lora" in about:
        student = DiffusionPipeline.from_pretrained(tmp_path / "teacher")
        student.scheduler = type(pipeline.scheduler).from_pretrained(folder, subfolder="scheduler")
        student.load_lora_weights(str(folder), weight_name=about["lora"]["file"])
        weights = load_file(folder / about["lora"]["file"])
        assert max(float(value.abs().max()) for name, value in weights.items() if "lora_B" in name) > 1e-5
    else:
        student = DiffusionPipeline.from_pretrained(folder)
        changed = zip(student.transformer.parameters(), pipeline.transformer.parameters(), strict=True)
        assert max(float((own - before).detach().abs().max()) for own, before in changed) > 1e-4
    network = getattr(student, about["component"])
    own = NetworkDenoiser(network, recording.recipe, recording.schedule, recording.prediction_type)
    ends = []
    for item in items:
        first, z = _decoded(student, item, about)
        (told,) = recording.condition_each(items=[item])
        with torch.no_grad():
            end = rollout(own, Sampler(recording.schedule, tuple(about["grid"]), "ode"), first, told)
        torch.testing.assert_close(recording.codec.to_decoder(end, told), z, rtol=0, atol=1e-5)
        ends.append(z)
    assert float((ends[0] - ends[1]).norm()) > 0.05 * float(ends[0].norm())
