"""AnyFlow's runs: both stages in one command, and students that load stock, Wan's in diffusers' own class."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AnyFlowPipeline, DiffusionPipeline
from tiny_pipelines import WAN_CALL, dense_wan, tiny_flow, tiny_wan

import fewstep
from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.errors import UserError
from fewstep.export import ExportError
from fewstep.networks.two_time_form import GATE, DeltaTime, from_two_time_form, to_two_time_form
from fewstep.programs.distillation import prepare
from fewstep.programs.workbench import open_workbench
from fewstep.recording.watch.shake import shaken
from fewstep.trainers.any_flow import AnyFlowConfig
from fewstep.training.checkpoint import find_latest
from tests.stock_process import sample_stock
from tests.whole_runs import whole_run

RUN = {"steps": 4, "max_steps": 3, "map_steps": 2, "batch_size": 2, "num_pairs": 4, "pair_steps": 2, "lr": 1e-2}
RUN |= {"sample_steps": 0, "report_to": "none", "cpu": True, "log_steps": 1, "equal_share": 0.0, "zero_share": 0.5}
FLOW_CALL = {"height": 16, "width": 16, "max_sequence_length": 8}
FAMILIES: dict[str, tuple] = {
    "video": (dense_wan, "transformer", {"call": WAN_CALL, "ema_decay": 0.5}),
    "flow adapters": (tiny_flow, "transformer", {"call": FLOW_CALL, "lora_rank": 2, "gradient_checkpointing": True}),
}


class Finished:
    """A run, its student's folder, and what the trained role makes of one noise at every count."""

    def __init__(self, place: Path, name: str) -> None:
        builder, network, settings = FAMILIES[name]
        self.pipeline = builder()
        (place / "prompts.txt").write_text("a cat\na dog\n")
        told = {"prompts": str(place / "prompts.txt")}
        with shaken(self.pipeline.components[network]):
            self.settings = {**RUN, **told, **settings}
            config = AnyFlowConfig(teacher=name, out=str(place / name), **self.settings)
            self.run = whole_run(config, "any_flow", self.pipeline)
        self.folder, bench = self.run.folder, self.run.bench
        self.about = json.loads((self.folder / "fewstep.json").read_text())
        conditioning = bench.conditions.select([0])
        noise = torch.randn(1, *bench.recording.sample_shape, generator=torch.Generator().manual_seed(5))
        self.expected = {}
        for count in self.about["counts"]:
            sampler = Sampler(bench.sampler.schedule, bench.student.plan.grids[count], "ode")
            with torch.no_grad():
                self.expected[count] = rollout(self.run.role, sampler, noise, conditioning)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    """Every family's student."""
    place = tmp_path_factory.mktemp("any_flow")
    return {name: Finished(place, name) for name in FAMILIES}


def test_students_sample_without_this_package_as_they_were_trained(finished: dict[str, Finished], tmp_path: Path):
    """At every count; Wan's from diffusers' own pipeline of two times, without code of ours."""
    sampled = sample_stock(tmp_path / "sampled.npz", *(one.folder for one in finished.values()))
    for (name, student), stock in zip(finished.items(), sampled, strict=True):
        assert {1, 2, 4} <= set(student.about["counts"]) and student.about["trained_at_every_count"]
        assert student.about.get("code") == (None if name == "video" else "flow_map.py")
        for count, expected in student.expected.items():
            found = stock.latents[count].transpose(1, 2) if name == "video" else stock.latents[count]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3 * float(expected.abs().max()))


def test_wans_student_loads_into_diffusers_class_and_answers_as_it_was_trained(finished: dict[str, Finished]):
    """To 1e-5 in float32, at r < t, r = 0 and r = t, where an untrained one is the teacher."""
    student = finished["video"]
    index = json.loads((student.folder / "model_index.json").read_text())
    assert index["_class_name"] == "AnyFlowPipeline" and not list(student.folder.rglob("*.py"))
    pipeline = DiffusionPipeline.from_pretrained(student.folder)
    assert type(pipeline) is AnyFlowPipeline
    assert pipeline.transformer.config.gate_value == GATE and pipeline.transformer.config.deltatime_type == "t-r"
    bench, denoiser = student.run.bench, student.run.role.single.denoiser
    x = torch.randn(3, *bench.recording.sample_shape, generator=torch.Generator().manual_seed(1))
    t, r = (torch.tensor(times, dtype=torch.float64) for times in ((1.0, 0.7, 0.4), (0.35, 0.0, 0.4)))
    told = bench.conditions.select([0, 1, 0])
    with torch.no_grad():
        said = denoiser.raw(x, t, told, r)
        frames = x.shape[2]
        at = {name: (1000 * time)[:, None].expand(3, frames) for name, time in (("timestep", t), ("r_timestep", r))}
        text = {"encoder_hidden_states": told.arguments()["encoder_hidden_states"]}
        stock = pipeline.transformer(x.transpose(1, 2), **at, **text, return_dict=False)[0].transpose(1, 2)
    assert float((stock - said).abs().max() / said.abs().max()) < 1e-5
    assert float(student.run.role.added["second_time"].embedder.linear_2.weight.abs().max()) > 0


def test_an_untrained_second_time_of_that_form_is_the_teacher_and_comes_back_as_it_was():
    network = dense_wan().transformer
    with shaken(network):
        second_time = DeltaTime("transformer", network.condition_embedder.time_embedder)
        stock = to_two_time_form(network, second_time)
        x, text = torch.randn(2, 16, 3, 2, 2), torch.randn(2, 8, network.config.text_dim)
        t = torch.tensor([900.0, 250.0])
        with torch.no_grad():
            (expected,) = network(x, t, text, return_dict=False)
            for r in (t, t / 3, 0 * t):
                at = [time[:, None].expand(2, 3) for time in (t, r)]
                (found,) = stock(x.transpose(1, 2), *at, text, return_dict=False)
                torch.testing.assert_close(found.transpose(1, 2), expected, rtol=1e-5, atol=1e-5)
        torch.nn.init.normal_(second_time.embedder.linear_2.weight)
        state, told = from_two_time_form(to_two_time_form(network, second_time))
        for mine, theirs in ((state, network.state_dict()), (told, second_time.state_dict())):
            assert mine.keys() == theirs.keys()
            for key, value in theirs.items():
                torch.testing.assert_close(mine[key], value, rtol=1e-6, atol=1e-7)


def test_another_gate_is_refused_on_loading(finished: dict[str, Finished], tmp_path: Path):
    """diffusers takes any: it is a word of the configuration alone."""
    folder = Path(shutil.copytree(finished["video"].folder, tmp_path / "student"))
    assert fewstep.load(folder).transformer.config.gate_value == GATE
    path = folder / "transformer" / "config.json"
    told: dict[str, Any] = json.loads(path.read_text())
    for wrong in ({"gate_value": 0.5}, {"deltatime_type": "r"}):
        path.write_text(json.dumps(told | wrong))
        DiffusionPipeline.from_pretrained(folder)
        with pytest.raises(ExportError, match=r"put that back into transformer/config\.json") as caught:
            fewstep.load(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["run", "folder"])
def test_stage_two_goes_on_from_a_student_of_that_form(finished: dict[str, Finished], form: str, tmp_path: Path):
    student = finished["video"]
    init = student.folder if form == "folder" else student.folder.parent
    settings = {**student.settings, "stage": "on_policy", "map_steps": None, "max_steps": 2, "init": str(init)}
    config = AnyFlowConfig(teacher="video", out=str(tmp_path / "next"), **settings)
    role = prepare(open_workbench(config, "cpu", student.pipeline), "any_flow").roles["student"]
    # The folder holds the average; of the run it is the student itself, which goes on.
    expected = student.run.role.state_dict() if form == "folder" else checkpointed(student.folder.parent)
    assert role.state_dict().keys() == expected.keys()
    for key, value in role.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)


def checkpointed(out: Path) -> dict[str, torch.Tensor]:
    return find_latest(out / "checkpoints").tensors()["student"]


def test_several_networks_that_share_the_time_are_refused_in_one_line(tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    settings = {**RUN, "call": WAN_CALL, "prompts": str(tmp_path / "prompts.txt")}
    config = AnyFlowConfig(teacher="wan", out=str(tmp_path / "run"), **settings)
    with pytest.raises(UserError, match="WanPipeline has 2 networks that share the time") as caught:
        prepare(open_workbench(config, "cpu", tiny_wan()), "any_flow")
    assert "\n" not in str(caught.value)
