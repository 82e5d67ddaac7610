"""Flow losses: the velocity's error in every family and prediction type, and the distances' limits."""

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.prediction import add_noise, from_x0, to_x0
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, NoiseSchedule, TableSchedule
from fewstep.losses.flow import squared, velocity_error

TABLE = TableSchedule(torch.linspace(1 - 1e-4, 1 - 0.02, 1000, dtype=torch.float64).cumprod(0))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("schedule", "kind"),
    [(FlowSchedule(), "flow"), (TABLE, "epsilon"), (TABLE, "v_prediction"), (EDMSchedule(), "edm")],
)
def test_the_error_is_that_of_rectified_flow_at_equal_signal_to_noise_ratio(schedule: NoiseSchedule, kind: str):
    """At y = x_t / (alpha + sigma) the velocity that stands for x0 is (y - x0) / tau, and noise - x0 is meant."""
    t = torch.tensor([0.05, 0.4, 0.9], dtype=torch.float64)
    x0, noise, guess = normal(3, 2, 4), normal(3, 2, 4), normal(3, 2, 4)
    x_t = add_noise(x0, noise, schedule.coefficients(t))
    raw = from_x0(guess, kind, x_t, schedule, t)
    x0_student = to_x0(raw, kind, x_t, schedule, t)
    alpha, sigma = (c.reshape(3, 1, 1) for c in schedule.coefficients(t))
    y, tau = x_t / (alpha + sigma), sigma / (alpha + sigma)
    torch.testing.assert_close(y, (1 - tau) * x0 + tau * noise)
    expected = (y - x0_student) / tau - (noise - x0)
    torch.testing.assert_close(velocity_error(x0, x0_student, schedule.flow_time(t)), expected, rtol=1e-9, atol=1e-9)


def test_for_a_flow_network_it_is_its_own_error():
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    x0, noise, flow = normal(2, 5), normal(2, 5), normal(2, 5)
    x_t = add_noise(x0, noise, FlowSchedule().coefficients(t))
    error = velocity_error(x0, to_x0(flow, "flow", x_t, FlowSchedule(), t), t)
    torch.testing.assert_close(error, flow - (noise - x0))
    torch.testing.assert_close(squared(error), (flow - (noise - x0)).square().mean(1))


def test_gradient_flows_to_the_student_only():
    x0, student = normal(2, 5).requires_grad_(), normal(2, 5).requires_grad_()
    squared(velocity_error(x0, student, torch.tensor([0.5, 1.0]))).sum().backward()
    assert x0.grad is None
    assert student.grad.abs().sum() > 0
    assert velocity_error(x0, student.bfloat16(), torch.tensor([0.5, 1.0])).dtype == torch.float32
