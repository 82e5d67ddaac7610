"""Students that walk as TCD's do: the stock scheduler of a table, the project's own of a flow, and what is refused."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, TCDScheduler

from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.diffusion.strategic import Move
from fewstep.export import ExportError, SchedulerCheckError, export_student, load, plan_student
from fewstep.export.own_code import is_own_code
from fewstep.export.walk.plan import check_student
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.pipelines.tcd_flow import FlowTCDScheduler
from fewstep.recording.pipeline import with_parts
from tests.stock_process import run_stock

_STOCK = """
import json, sys
import torch
from diffusers import DiffusionPipeline

folder, again, subject, out, words = json.loads(sys.argv[1])
about = json.load(open(folder + "/fewstep.json"))
pipe = DiffusionPipeline.from_pretrained(folder, **about["load"], **words)
pipe.save_pretrained(again)
pipe = DiffusionPipeline.from_pretrained(again, **about["load"], **words)
pipe.set_progress_bar_config(disable=True)
latents = {}
for count in about["counts"]:
    torch.manual_seed(1)
    call = {**about["call"], "num_inference_steps": count}
    result = pipe(**subject, **call, generator=torch.Generator().manual_seed(0), output_type="latent")
    latents[str(count)] = result[0]
torch.save(latents, out)
"""


def own_latents(recording, network, plan, subject, count: int) -> torch.Tensor:
    """The trainer's own walk under the noise that the pipeline draws."""
    denoiser = NetworkDenoiser(network, recording.recipe, recording.schedule, recording.prediction_type)
    sampler = Sampler(recording.schedule, plan.grids[count], plan.renoise, plan.initial_scale, plan.gamma)
    first = torch.Generator().manual_seed(0)
    steps = torch.Generator().manual_seed(1) if plan.noise_follows == "global seed" else first
    draw = partial(torch.randn, (1, *recording.sample_shape))
    noise = draw(generator=first)
    with torch.no_grad():
        conditioning = recording.condition(prompts=[subject["prompt"]])
        return rollout(denoiser, sampler, noise, conditioning, lambda _k: draw(generator=steps))


@pytest.mark.parametrize("name", ["stable_diffusion", "flow"])
def test_stock_diffusers_walks_as_the_trainer_does_at_every_count(recorded, trained, subject, tmp_path: Path, name):
    recording = recorded(name)
    plan = plan_student(recording, 4, renoise="tcd", gamma=0.3)
    assert (plan.renoise, plan.gamma, plan.counts) == ("tcd", 0.3, (1, 2, 3, 4))
    network = trained(recording)
    folder = export_student(recording, network, plan, tmp_path / "s", method="tcd", base_model="example/teacher")
    table = name == "stable_diffusion"
    assert plan.call.get("eta") == (0.3 if table else None)
    about = json.loads((folder / "fewstep.json").read_text())
    assert (about["renoise"], about["gamma"], about.get("code")) == ("tcd", 0.3, None if table else "tcd_flow.py")
    assert type(plan.scheduler) is (TCDScheduler if table else FlowTCDScheduler)
    words = {} if table else {"trust_remote_code": True}
    ours = subject(recording)
    run_stock(_STOCK, json.dumps([str(folder), str(tmp_path / "again"), ours, str(tmp_path / "x.pt"), words]))
    theirs = torch.load(tmp_path / "x.pt", weights_only=True)
    for count in plan.counts:
        own = own_latents(recording, network, plan, ours, count)
        torch.testing.assert_close(theirs[str(count)], own, rtol=0, atol=1e-4 * float(own.abs().max()))
    # Loaded by this package it asks for nothing, and a bare call is the one on the card.
    assert table or is_own_code(folder)
    pipeline = load(folder)
    latents = pipeline(**ours, generator=torch.Generator().manual_seed(0), output_type="latent")[0]
    if plan.noise_follows == "generator":
        torch.testing.assert_close(latents, theirs["4"], rtol=0, atol=1e-4)
    assert "gamma" in (folder / "README.md").read_text() or "eta" in (folder / "README.md").read_text()


def test_code_beside_a_scheduler_is_trusted_to_the_letter_alone(recorded, trained, tmp_path: Path):
    recording = recorded("flow")
    plan = plan_student(recording, 2, renoise="tcd", gamma=0.5)
    folder = export_student(recording, trained(recording), plan, tmp_path / "s", method="tcd", base_model="a/b")
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(folder)
    code = folder / "scheduler" / "tcd_flow.py"
    code.write_text(code.read_text() + "\n# more\n")
    assert not is_own_code(folder)


@pytest.mark.parametrize(("name", "told"), [("stable_diffusion", {"eta": 0.2}), ("flow", {})])
def test_a_walk_with_another_gamma_is_seen(recorded, name, told):
    recording = recorded(name)
    plan = plan_student(recording, 4, renoise="tcd", gamma=0.3)
    scheduler = plan.scheduler if told else FlowTCDScheduler(shift=plan.shift, gamma=0.2)
    pipeline = with_parts(recording.pipeline, scheduler=scheduler)
    with pytest.raises(SchedulerCheckError, match="does not lead to the teacher's x_t"):
        check_student(recording, pipeline, plan.call | told, Move("tcd", 0.3), 4)
    check_student(recording, pipeline, plan.call | told, Move("tcd", 0.2), 4)


def test_auto_takes_it_for_tables_where_it_ships(recorded):
    assert plan_student(recorded("stable_diffusion"), 2, gamma=0.3).renoise == "tcd"
    assert plan_student(recorded("flow"), 2, gamma=0.3).renoise == "ode"
    plan = plan_student(recorded("ddim"), 2, gamma=0.3)
    assert plan.renoise == "ode" and "TCD's walk with gamma 0.3 cannot ship" in plan.note


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("edm", {"gamma": 0.3}, "EDM"),
        ("ddim", {"gamma": 0.3}, "cannot ship"),
        ("stable_diffusion", {"gamma": 1.5}, r"needs a gamma in \(0, 1\]"),
        ("stable_diffusion", {}, r"needs a gamma in \(0, 1\]"),
    ],
)
def test_what_cannot_walk_so_is_refused_in_one_line(recorded, name, settings, message):
    with pytest.raises(ExportError, match=message) as caught:
        plan_student(recorded(name), 2, renoise="tcd", **settings)
    assert "\n" not in str(caught.value)
