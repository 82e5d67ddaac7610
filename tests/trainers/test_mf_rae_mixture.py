"""MF-RAE of a mixture of Gaussians: its stages one after another, and one checkpoint that more steps make no worse."""

import itertools
from pathlib import Path

import pytest
import torch
from mixture import MixtureTeacher, energy_distance, mixture_sample
from toys import Labels, make_loop, role, unconditional

from fewstep.data.batch import Real
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.rollout import Sampler, ode_sampler, rollout
from fewstep.networks.flow_map import FlowMapDenoiser
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.trainers.mf_rae import MfRae, MfRaeConfig
from tests.trainers.test_mean_flow_mixture import SCHEDULE, Samples, Telling, TwoTimes

COUNTS = (1, 2, 4, 8, 16)


def trained(out: Path, **settings) -> MfRae:
    """The trainer's class after a run in the real loop, from the teacher's own velocity."""
    torch.manual_seed(0)
    networks = {"teacher": MixtureTeacher()} | {name: TwoTimes(from_teacher=True) for name in ("student", "ema")}
    kinds = {"teacher": "sample", "student": "flow", "ema": "flow"}
    roles = {name: role(name, net, SCHEDULE, kinds[name], name == "student") for name, net in networks.items()}
    roles["ema"].copy_weights(roles["student"])
    for name in ("student", "ema"):
        roles[name].denoiser = FlowMapDenoiser(roles[name].denoiser, Telling())
    watching = {"report_to": "none", "sample_steps": 0, "log_steps": 1000, "checkpointing_steps": 9000}
    how = {
        "data": "mixture",
        "time_shift": 1.0,
        "apart": 1.0,
        "pairs_per_walk": 16,
        "weight_power": 0.75,
        "ema_decay": 0.995,
    }
    config = MfRaeConfig(teacher="mixture", out=str(out), batch_size=64, lr=3e-3, **{**watching, **how, **settings})
    sampler = Sampler(SCHEDULE, (1.0,), "ode")
    method = MfRae(config, roles, GuidedDenoiser(roles["teacher"], 1.0, further=0), sampler, 2)
    make_loop(method, config, (2,), conditions=Labels(None), real=Samples(Real)).run()
    return method


@torch.no_grad()
def sampled(method: MfRae, steps: int, seed: int) -> torch.Tensor:
    """2,000 of the student's samples; of the teacher's own by 64 steps of its ODE for no steps."""
    noise = Draws(seed, 0, range(2000)).normal("noise", (2,))
    if not steps:
        return rollout(method.roles["teacher"], ode_sampler(SCHEDULE, 64), noise, unconditional(2000))
    grid = Sampler(SCHEDULE, tuple((steps - k) / steps for k in range(steps)), "ode")
    return rollout(method.roles["ema"], grid, noise, unconditional(2000))


STAGES = {
    "teacher": {"stages": "cmt:230,mfd", "max_steps": 380},
    "bootstrapped": {"stages": "cmt:400,mfd:400,mft", "max_steps": 1200},
}


@pytest.mark.parametrize(
    "run", [pytest.param(run, marks=[pytest.mark.soak] if run != "teacher" else []) for run in STAGES]
)
def test_more_steps_of_one_checkpoint_are_no_further_from_the_teachers_own_samples(run: str, tmp_path: Path):
    """The teacher's samples of other seeds are within 0.005 of each other; one of its own steps is 1.5 away."""
    method = trained(tmp_path, **STAGES[run])
    seeds = (1, 2)
    theirs = [sampled(method, 0, 10 + seed) for seed in seeds]
    floor = abs(energy_distance(*theirs))
    found = [[energy_distance(sampled(method, n, s), of) for s, of in zip(seeds, theirs, strict=True)] for n in COUNTS]
    means = [sum(each) / 2 for each in found]
    spread = max(max(each) - min(each) for each in found) + floor
    assert all(after <= before + spread for before, after in itertools.pairwise(means)), means
    assert means[0] < 0.7 and means[1] < 0.1 and means[2] < 0.03 and means[4] < 0.02, (means, floor)
    truth = energy_distance(sampled(method, 4, 3), mixture_sample(2000, 1))
    assert truth < 0.03, truth
