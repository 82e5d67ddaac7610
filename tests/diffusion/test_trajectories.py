"""Chords between the states of a walk, worked out here in rectified flow's coordinates."""

import pytest
import torch
from toys import TABLE

from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, NoiseSchedule
from fewstep.diffusion.trajectories import LABEL_TIMES, Trajectories

PAIRS = [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]


@pytest.mark.parametrize("labels", LABEL_TIMES)
@pytest.mark.parametrize("schedule", [FlowSchedule(), TABLE, EDMSchedule()], ids=["flow", "table", "edm"])
def test_a_chord_is_the_average_velocity_between_two_states_at_the_times_they_are_told(
    schedule: NoiseSchedule, labels: str
):
    """The first state is a clean sample, at flow time 0 and of no noise, whatever the schedule has there."""
    times = torch.tensor([0.0, 0.3, 0.5, 1.0], dtype=torch.float64)
    states = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    walks = torch.arange(6) % 2
    chord = Trajectories(schedule, states, times, labels).chords(torch.arange(6), walks)
    alpha, sigma = schedule.coefficients(times)
    flow = (sigma / (alpha + sigma)).tolist()
    flow = [0.0, *flow[1:]] if labels == "solver_times" else [k / 3 * flow[-1] for k in range(4)]
    points = [states[0], *(states[k] / (alpha[k] + sigma[k]) for k in (1, 2, 3))]
    for row, (i, j) in enumerate(PAIRS):
        walk = int(walks[row])
        velocity = (points[i][walk] - points[j][walk]) / (flow[i] - flow[j])
        torch.testing.assert_close(chord.velocity[row], velocity)
        assert torch.equal(chord.x_t[row], states[i, walk])
        told = [0.0 if time == 0 else float(schedule.flow_time(time)) for time in (chord.t[row], chord.r[row])]
        assert told == pytest.approx([flow[i], flow[j]], abs=1e-6)
