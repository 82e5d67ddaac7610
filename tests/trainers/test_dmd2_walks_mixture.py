"""A pulled critic, CDM's walk and DP-DMD's, on a teacher whose score has a closed form: where students end is known."""

from pathlib import Path

import pytest
import torch
from mixture import MixtureTeacher, distance_of_walk
from toys import Labels, make_loop, role

from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import FlowSchedule
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.trainers.dmd2 import Dmd2, Dmd2Config

WALKS = {
    "ida": {"critic_follows_student": 0.97, "critic_updates": 1, "max_steps": 600},
    "cdm": {"schedule": "random", "schedule_most": 4, "off_trajectory": 1.0, "normalizer_min": 0.1, "renoise": "ode"},
}


@pytest.mark.soak
@pytest.mark.parametrize("walk", WALKS)
def test_a_student_of_a_mixture_comes_to_draw_from_it(tmp_path: Path, walk: str):
    given = {"max_steps": 900, "critic_updates": 3, "renoise": "fresh", **WALKS[walk]}
    before, after = distil(tmp_path, (1.0, 0.75), **given)
    assert before > 0.3
    assert after < 0.15  # two exact samples of 3000 are 0.003 apart


def test_behind_a_taught_first_step_the_match_brings_the_second_to_the_mixture(tmp_path: Path):
    """DP-DMD: the match does not reach the first step, which the teacher's path teaches."""
    given = {"max_steps": 400, "critic_updates": 2, "renoise": "ode", "steps": 2, "normalizer": "x_t"}
    before, after = distil(tmp_path, (1.0, 0.5), **given, diversity_weight=1.0)
    assert before > 0.18  # the teacher's own two steps
    assert after < 0.1  # 0.053 here; two exact samples of 3000 are 0.003 apart


def distil(out: Path, grid: tuple[float, ...], **given) -> tuple[float, float]:
    """How far a student is from the mixture before and after a run."""
    schedule, roles = FlowSchedule(), {}
    torch.manual_seed(0)
    for name in ("teacher", "student", "critic"):
        roles[name] = role(name, MixtureTeacher(), schedule, "sample", trainable=name != "teacher")
    sampler = Sampler(schedule, grid, given["renoise"])
    common = {"report_to": "none", "sample_steps": 0, "batch_size": 64, "lr": 2e-3, "critic_lr": 5e-3}
    common |= {"log_steps": 300, "checkpointing_steps": 1200}
    settings = Dmd2Config(teacher="mixture", out=str(out), **common, **given)
    method = Dmd2(settings, roles, GuidedDenoiser(roles["teacher"], 1.0, further=0), sampler)
    before = distance_of_walk(method.student, sampler)
    make_loop(method, settings, (2,), conditions=Labels(None)).run()
    return before, distance_of_walk(method.student, sampler)
