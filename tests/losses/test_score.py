"""Distribution matching and the critic's loss: identities, routing, and a problem with a known answer."""

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.prediction import KINDS, add_noise, from_x0
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, NoiseSchedule, TableSchedule
from fewstep.diffusion.timesteps import uniform_times
from fewstep.losses.score import denoising_loss, distribution_matching, native_weight


def triple(shape: tuple[int, ...] = (4, 3, 5, 5)) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(3, *shape, dtype=torch.float64))


def test_value_and_gradient_are_those_of_the_papers_pseudo_target():
    x0, teacher, critic = triple()
    x0.requires_grad_()
    direction = (critic - teacher) / (x0.detach() - teacher).abs().mean((1, 2, 3), keepdim=True)
    paper = 0.5 * (x0 - (x0.detach() - direction)).square().mean()
    paper.backward()
    ours = distribution_matching(x0, teacher, critic)
    torch.testing.assert_close(ours.loss, paper.detach())
    torch.testing.assert_close(ours.gradient, x0.grad)
    torch.testing.assert_close(ours.gradient, direction / direction.numel())


def test_nothing_flows_to_teacher_critic_or_sample():
    tensors = [x.requires_grad_() for x in triple()]
    ours = distribution_matching(*tensors)
    assert not ours.loss.requires_grad
    assert not ours.gradient.requires_grad


def test_agreement_of_teacher_and_critic_gives_zero():
    x0, teacher, _ = triple()
    ours = distribution_matching(x0, teacher, teacher)
    assert ours.loss == 0
    assert not ours.gradient.any()


def test_a_sample_equal_to_the_teachers_gets_no_gradient_and_spoils_no_other():
    x0, teacher, critic = triple()
    with_it = distribution_matching(torch.cat([teacher[:1], x0[1:]]), teacher, critic)
    assert not with_it.gradient[0].any()
    torch.testing.assert_close(with_it.gradient[1:], distribution_matching(x0, teacher, critic).gradient[1:])


def test_the_normalizer_is_bounded_from_below():
    x0, _, critic = triple()
    bounded = distribution_matching(x0, x0 + 1e-6, critic, normalizer_min=0.1)
    torch.testing.assert_close(bounded.gradient, (critic - x0 - 1e-6) / 0.1 / x0.numel())


def test_weights_scale_each_samples_gradient():
    weight = torch.tensor([0.0, 1.0, 2.0, -1.0])
    plain, weighted = distribution_matching(*triple()), None
    torch.manual_seed(0)
    tensors = triple()
    plain, weighted = distribution_matching(*tensors), distribution_matching(*tensors, weight=weight)
    torch.testing.assert_close(weighted.gradient, plain.gradient * weight.double().reshape(4, 1, 1, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype):
    x0, teacher, critic = (x.to(dtype) for x in triple())
    ours = distribution_matching(x0, teacher, critic)
    assert ours.gradient.dtype == ours.loss.dtype == torch.float32
    torch.testing.assert_close(ours, distribution_matching(x0.float(), teacher.float(), critic.float()))
    assert denoising_loss(x0, critic, torch.ones(4)).dtype == torch.float32


def test_the_critics_loss_reaches_the_critic_only():
    x0, predicted, _ = (x.requires_grad_() for x in triple())
    weight = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    loss = denoising_loss(x0, predicted, weight)
    loss.backward()
    assert x0.grad is None
    torch.testing.assert_close(
        predicted.grad, 2 * weight.reshape(4, 1, 1, 1) * (predicted - x0).detach() / predicted.numel()
    )


SCHEDULES = {
    "ddpm": TableSchedule(torch.linspace(1 - 1e-4, 1 - 0.02, 1000, dtype=torch.float64).cumprod(0)),
    "edm": EDMSchedule(),
    "flow": FlowSchedule(),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


@every_schedule
def test_the_native_weight_gives_the_squared_error_of_the_networks_own_output(schedule: NoiseSchedule):
    t = torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=torch.float64)
    x0, predicted, noise = triple()
    x_t = add_noise(x0, noise, schedule.coefficients(t))
    for kind in KINDS:
        if kind.startswith("edm") and not isinstance(schedule, EDMSchedule):
            continue
        error = from_x0(predicted, kind, x_t, schedule, t) - from_x0(x0, kind, x_t, schedule, t)
        torch.testing.assert_close(
            denoising_loss(x0, predicted, native_weight(kind, schedule, t)), error.square().mean(), rtol=1e-8, atol=0
        )


def test_the_native_weight_of_edm_is_karras():
    schedule, t = EDMSchedule(), torch.tensor([0.0, 0.3, 1.0])
    sigma = schedule.coefficients(t).sigma
    torch.testing.assert_close(native_weight("edm", schedule, t), sigma**-2 + 0.5**-2)


# --- a problem with a known answer ------------------------------------------------------------------------------------


def gaussian_x0(x_t: Tensor, schedule: NoiseSchedule, t: Tensor, mean: float, std: float) -> Tensor:
    """The exact denoiser of N(mean, std^2)."""
    alpha, sigma = (c.reshape(-1, 1).to(x_t) for c in schedule.coefficients(t))
    return mean + std**2 * alpha / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * mean)


def distil_gaussian(schedule: NoiseSchedule, normalized: bool, steps: int = 300) -> tuple[float, float]:
    """The student a z + b from (1, 0), the teacher N(2, 0.5^2), an exact critic: (a, b) after ``steps``."""
    a, b = (torch.tensor(value, requires_grad=True) for value in (1.0, 0.0))
    optimizer = torch.optim.Adam([a, b], lr=0.05)
    for _ in range(steps):
        x0 = a * torch.randn(32, 64) + b
        t = schedule.snap(uniform_times(torch.rand(32), 0.02, 0.98))
        x_t = add_noise(x0.detach(), torch.randn(32, 64), schedule.coefficients(t))
        teacher = gaussian_x0(x_t, schedule, t, 2.0, 0.5)
        critic = gaussian_x0(x_t, schedule, t, b.item(), a.item())
        undo = None if normalized else (x0.detach() - teacher).abs().mean(1)
        _, gradient = distribution_matching(x0, teacher, critic, weight=undo)
        optimizer.zero_grad()
        x0.backward(gradient)
        optimizer.step()
    return a.item(), b.item()


@every_schedule
@pytest.mark.parametrize("normalized", [True, False], ids=["normalized", "plain"])
def test_a_gaussian_student_becomes_the_gaussian_teacher(schedule: NoiseSchedule, normalized: bool):
    assert distil_gaussian(schedule, normalized) == pytest.approx((0.5, 2.0), abs=1e-3)
