"""DMD2's own class distils a teacher whose score has a closed form: where the student ends is known."""

from pathlib import Path

import pytest
import torch
from mixture import MixtureTeacher, distance_of_walk
from toys import Labels, make_loop, role

from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import FlowSchedule
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.trainers.dmd2 import Dmd2, Dmd2Config


@pytest.mark.parametrize(
    ("grid", "max_steps", "bound"),
    [
        pytest.param((1.0, 0.75), 400, 0.18, id="short"),  # 0.13 here
        pytest.param((1.0,), 1200, 0.15, id="one_step", marks=pytest.mark.soak),  # 0.11 here
        pytest.param((1.0, 0.75), 1200, 0.15, id="two_steps", marks=pytest.mark.soak),  # 0.10
    ],
)
def test_a_student_of_a_mixture_comes_to_draw_from_it(
    tmp_path: Path, grid: tuple[float, ...], max_steps: int, bound: float
):
    """Two exact samples of 3000 are 0.003 apart."""
    schedule, roles = FlowSchedule(), {}
    torch.manual_seed(0)
    for name in ("teacher", "student", "critic"):
        network = MixtureTeacher()
        roles[name] = role(name, network, schedule, "sample", trainable=name != "teacher")
    sampler = Sampler(schedule, grid, "fresh")
    settings = Dmd2Config(
        teacher="mixture",
        out=str(tmp_path),
        report_to="none",
        sample_steps=0,
        max_steps=max_steps,
        batch_size=64,
        lr=2e-3,
        critic_lr=5e-3,
        critic_updates=3,
        log_steps=400,
        checkpointing_steps=1200,
    )
    method = Dmd2(settings, roles, GuidedDenoiser(roles["teacher"], 1.0, further=0), sampler)
    before = distance_of_walk(method.student, sampler)
    make_loop(method, settings, (2,), conditions=Labels(None)).run()
    after = distance_of_walk(method.student, sampler)
    assert before > 0.5
    assert after < bound
