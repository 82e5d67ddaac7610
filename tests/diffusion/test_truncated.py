"""The law of TCM's noise levels, by the closed form that it has with one degree of freedom."""

import math

import torch

from fewstep.diffusion.discretization import SigmaRange
from fewstep.diffusion.schedule import FlowSchedule
from fewstep.diffusion.truncated import TruncatedTimes


def test_the_logarithms_of_noise_levels_follow_a_truncated_law_of_student():
    mean, std = 0.4, 0.3
    times = TruncatedTimes(SigmaRange(FlowSchedule(), 0.99), 0.5, gap=0.1, mean=mean, std=std, freedom=1.0)
    uniform = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    # Cauchy's distribution function is 1/2 + atan((x - mean) / std) / pi.
    low, high = (math.atan((math.log(end) - mean) / std) for end in (times.lowest, times.levels.sigma_max))
    expected = (mean + std * (low + uniform * (high - low)).tan()).exp()
    torch.testing.assert_close(times.noise_levels(uniform), expected, rtol=1e-4, atol=0)
