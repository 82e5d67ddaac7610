"""What pipelines beyond the tested families do, one at a time: layers called by keyword, sound, schedulers' names."""

from pathlib import Path

import tiny_pipelines
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor, nn

from fewstep.config.run import RunConfig
from fewstep.networks.adapters import called_by_keyword
from fewstep.networks.make_roles import RoleSettings, make_roles
from fewstep.programs.distillation import distill
from fewstep.recording import record
from fewstep.recording.call.invocation import read_invocation
from fewstep.recording.errors import RecordingError
from fewstep.recording.loop.few_step import refuse_few_step
from fewstep.recording.watch.shake import shaken
from fewstep.training.previews import Previews
from fewstep.training.samples import Samples

RUN = {"steps": 1, "max_steps": 2, "batch_size": 2, "log_steps": 1, "report_to": "none", "cpu": True}
RUN |= {"critic_updates": 1, "lr": 1e-2}


class _ByName(nn.Module):
    """Calls its linear layer by keyword, as AnimateDiff's layers do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(input=x)


def test_a_layer_whose_input_has_a_name_gets_no_adapter() -> None:
    pipeline = tiny_pipelines.tiny_ddim()
    path, attention = next((p, m) for p, m in pipeline.unet.named_modules() if hasattr(m, "to_q"))
    attention.to_q = _ByName(attention.to_q)
    recording = record(pipeline)
    assert called_by_keyword(recording, "cpu") == {f"{path}.to_q.linear"}
    roles = make_roles(RoleSettings(lora_rank=2), recording, ("student",), torch.device("cpu"))
    assert f"{path}.to_q.linear" not in roles["student"].backbone.targets
    assert f"{path}.to_k" in roles["student"].backbone.targets
    x, t = torch.randn(1, *recording.sample_shape), torch.full((1,), 0.5, dtype=torch.float64)
    assert roles["student"](x, t, recording.condition()).isfinite().all()


def test_where_no_way_leads_to_images_a_run_goes_without_grids(tmp_path: Path, monkeypatch, caplog) -> None:
    pipeline = tiny_pipelines.tiny_ddim()

    def unreadable(recording: object) -> None:
        raise RecordingError("no map to invert")

    monkeypatch.setattr("fewstep.recording.recording.read_codec", unreadable)
    with caplog.at_level("INFO", logger="fewstep"), shaken(pipeline.unet):
        folder = distill(pipeline, "dmd2", out=str(tmp_path / "run"), **RUN, sample_steps=1)
    assert (folder / "model_index.json").is_file() and "no sample grids: no map to invert" in caplog.messages
    assert not (tmp_path / "run" / "samples").exists()


def test_sound_is_not_drawn(tmp_path: Path, monkeypatch) -> None:
    recording = record(tiny_pipelines.tiny_ddim())
    samples = Samples(RunConfig(teacher="t", out=""), recording, None, torch.device("cpu"), lambda told: told)
    monkeypatch.setattr(samples, "batches", lambda count: [range(count)])
    monkeypatch.setattr(samples, "x0", lambda *_: torch.randn(2, 2, 8))
    monkeypatch.setattr(samples, "pictures", lambda *_: torch.zeros(2, 2, 8))
    previews = Previews(samples)
    numbers = previews.save(tmp_path / "a.png", None, None, None)
    assert not (tmp_path / "a.png").exists() and numbers["samples/student_std"] > 0


def test_a_solver_of_edm_is_no_few_step_scheduler() -> None:
    pipeline = tiny_pipelines.tiny_edm()
    pipeline.register_modules(scheduler=EDMDPMSolverMultistepScheduler())
    refuse_few_step(pipeline, read_invocation(pipeline, {}))


def test_a_table_between_its_entries_is_proven_at_its_entries() -> None:
    pipeline = tiny_pipelines.tiny_stable_diffusion()
    pipeline.scheduler = EulerDiscreteScheduler(beta_start=1e-4, beta_end=0.02)
    with shaken(pipeline.unet):
        for parameter in pipeline.unet.conv_out.parameters():
            parameter.data = parameter.data * 0.1  # so that x0 is x, whose scale follows the noise level
        recording = record(pipeline)
        recording.prove()
