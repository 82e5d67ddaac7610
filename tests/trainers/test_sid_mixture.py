"""SiD's own class distils a teacher whose score has a closed form: where the student ends is known."""

from pathlib import Path

import pytest
import torch
from mixture import MixtureTeacher, energy_distance, mixture_sample
from toys import Labels, make_loop, role, unconditional

from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.diffusion.schedule import FlowSchedule
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.trainers.sid import Sid, SidConfig


@pytest.mark.parametrize(
    ("grid", "max_steps", "bound"),
    [
        pytest.param((1.0, 0.75), 400, 0.18, id="short"),  # 0.12 and 0.14 here
        pytest.param((1.0,), 1200, 0.13, id="one_step", marks=pytest.mark.soak),
        pytest.param((1.0, 0.75), 1200, 0.13, id="two_steps", marks=pytest.mark.soak),
    ],
)
def test_a_student_of_a_mixture_comes_to_draw_from_it(
    tmp_path: Path, grid: tuple[float, ...], max_steps: int, bound: float
):
    """In several steps it is the uniform mixture of all their outputs that comes to agree with the teacher."""
    schedule, roles = FlowSchedule(), {}
    torch.manual_seed(0)
    for name in ("teacher", "student", "critic"):
        roles[name] = role(name, MixtureTeacher(), schedule, "sample", trainable=name != "teacher")
    sampler = Sampler(schedule, grid, "fresh")
    settings = SidConfig(
        teacher="mixture",
        out=str(tmp_path),
        report_to="none",
        sample_steps=0,
        max_steps=max_steps,
        batch_size=64,
        lr=2e-3,
        critic_lr=5e-3,
        adam_beta1=0.0,
        critic_updates=3,
        log_steps=400,
        checkpointing_steps=1200,
    )
    guided = [GuidedDenoiser(roles[name], 1.0, further=0) for name in ("teacher", "critic", "critic")]
    method = Sid(settings, roles, *guided, sampler)
    target = mixture_sample(3000, 1)

    def distance(*ends: int) -> float:
        generator = torch.Generator().manual_seed(2)
        count = 3000 // len(ends)
        pieces = []
        for last in ends:
            with torch.no_grad():
                noise = torch.randn(count, 2, generator=generator)
                between = torch.randn(count, 2, generator=generator)
                pieces.append(
                    rollout(roles["student"], sampler, noise, unconditional(count), lambda _k, b=between: b, last)
                )
        return energy_distance(torch.cat(pieces), target)

    before = distance(len(grid) - 1)
    make_loop(method, settings, (2,), conditions=Labels(None)).run()
    assert before > 0.5
    # Two exact samples of 3000 are 0.003 apart. Here the last step ends at 0.06 (one step) and 0.09 (two steps).
    assert distance(len(grid) - 1) < bound
    assert distance(*range(len(grid))) < bound
