"""Where jumps are judged: noised alike, within the segment above their end, by the closed form of that noise."""

from pathlib import Path

import pytest
import torch
from toys import TABLE

from fewstep.critic.jumps import JumpNoise
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.schedule import FlowSchedule, NoiseSchedule
from fewstep.diffusion.segments import Segments, Stage
from tests.trainers.test_consistency import batch
from tests.trainers.toy_segmented import config, vector_method

both_schedules = pytest.mark.parametrize(
    ("schedule", "kind"), [(FlowSchedule(), "flow"), (TABLE, "epsilon")], ids=["flow", "table"]
)


@both_schedules
def test_jumps_are_judged_above_their_end_within_a_span_and_at_times_that_the_network_knows(
    tmp_path: Path, schedule: NoiseSchedule, kind: str
):
    method = vector_method(config(tmp_path, "pcm", adversarial_weight=[0.1]), schedule, kind)
    end, span = (torch.tensor(one, dtype=torch.float64).repeat(400) for one in ([0.0, 0.5, 0.9], [0.5, 0.25, 0.5]))
    t = method.judge.noised(end, span, Draws(0, 0, range(1200)), (6,)).t.reshape(400, 3)
    lowest = torch.tensor([schedule.after(0.0), 0.5, 0.9], dtype=torch.float64)
    highest = torch.tensor([0.5, 0.75, 1.0], dtype=torch.float64)
    assert bool((t >= lowest - 1e-12).all()) and bool((t <= highest + 1e-12).all())
    torch.testing.assert_close(t.amin(0), lowest, rtol=0, atol=5e-3)
    torch.testing.assert_close(t.amax(0), highest, rtol=0, atol=5e-3)


@both_schedules
def test_what_arrived_is_noised_by_what_lacks_to_a_later_time(schedule: NoiseSchedule, kind: str):
    """x_t = a x0 + s n in law: a jump's end is scaled by the ratio of the signals, and variances add up."""
    end, t = (torch.tensor(one, dtype=torch.float64) for one in ([0.1, 0.5], [0.4, 0.9]))
    before, after = schedule.coefficients(end), schedule.coefficients(t)
    shown = [
        JumpNoise(schedule, end, t, torch.full((2, 6), size, dtype=torch.float64)).on(torch.ones(2, 6).double())[:, 0]
        for size in (0.0, 1.0)
    ]
    kept, added = shown[0], shown[1] - shown[0]
    torch.testing.assert_close(kept, after.alpha / before.alpha)
    torch.testing.assert_close((kept * before.sigma) ** 2 + added**2, after.sigma**2)


@pytest.mark.parametrize(
    ("loss", "own", "students"), [("hinge", 0.8 + 0.7, 1.2), ("non_saturating", 0.5981 + 0.5544, 0.7981)]
)
def test_the_targets_jumps_are_the_real_ones(tmp_path: Path, loss: str, own: float, students: float):
    """Of logits 0.3 for the target's and -0.2 for the student's."""
    judge = vector_method(config(tmp_path, "pcm", adversarial_weight=[0.1], adversarial_loss=loss)).judge
    judge.role.denoiser.features = lambda x, *_: x
    judge.role.added["head"].forward = lambda features: features[:, 0]
    half = torch.full((2,), 0.5, dtype=torch.float64)
    noise = JumpNoise(FlowSchedule(), half, half, torch.ones(2, 6))  # which is where they are already
    real, fake = (torch.full((2, 6), logit) for logit in (0.3, -0.2))
    assert float(judge.own_loss(fake, real, noise, None)) == pytest.approx(own, abs=1e-4)
    assert float(judge.student_loss(fake, noise, None)) == pytest.approx(students, abs=1e-4)


def test_jumps_that_arrived_at_an_edge_are_judged_in_the_segment_above_it(tmp_path: Path):
    method = vector_method(config(tmp_path, "pcm", adversarial_weight=[0.1], alternate=False))
    (stage,) = method.stages
    method.stages = [Stage(stage.grid, Segments((0.0, 0.25, 1.0)), stage.to_edge)]
    told: dict[float, set[float]] = {}
    noised = method.judge.noised

    def watched(end: torch.Tensor, span: torch.Tensor, *rest: object) -> JumpNoise:
        for one, length in zip(end.tolist(), span.tolist(), strict=True):
            told.setdefault(one, set()).add(length)
        return noised(end, span, *rest)

    method.judge.noised = watched
    for step in range(20):
        list(method.turns(step, batch(step, range(8), real=True)))
    assert told == {0.0: {0.25}, 0.25: {0.75}}
