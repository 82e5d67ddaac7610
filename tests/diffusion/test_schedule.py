"""Schedules: derivatives, inverses, table entries, and agreement with the stock diffusers schedulers they stand for."""

import math

import diffusers
import pytest
import torch
from torch import Tensor

from fewstep.diffusion.prediction import add_noise, to_x0
from fewstep.diffusion.schedule import (
    EDMSchedule,
    FlowSchedule,
    NoiseSchedule,
    TableSchedule,
    TrigFlowSchedule,
    from_scheduler,
)

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def table(**changes) -> TableSchedule:
    return TableSchedule(diffusers.DDIMScheduler(**SD, **changes).alphas_cumprod)


SCHEDULES = {
    "table": table(),
    "zero_snr_table": table(rescale_betas_zero_snr=True),
    "flow": FlowSchedule(),
    "edm": EDMSchedule(),
    "trigflow": TrigFlowSchedule(),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def times(count: int = 41) -> Tensor:
    """Times strictly inside (0, 1) that are no entries of a table of 1000."""
    return torch.linspace(0.0203, 0.9787, count, dtype=torch.float64) + 1e-5


@every_schedule
def test_flow_times_are_inverted_and_keep_the_signal_to_noise_ratio(schedule: NoiseSchedule):
    t = times()
    flow_time = schedule.flow_time(t)
    torch.testing.assert_close(schedule.time_from_flow_time(flow_time), t, rtol=1e-9, atol=1e-12)
    alpha, sigma = schedule.coefficients(t)
    torch.testing.assert_close(flow_time / (1 - flow_time), sigma / alpha)


@every_schedule
def test_derivatives_agree_with_finite_differences(schedule: NoiseSchedule):
    t, h = times(), 1e-6
    after, before = schedule.coefficients(t + h), schedule.coefficients(t - h)
    for derivative, high, low in zip(schedule.derivatives(t), after, before):
        torch.testing.assert_close(derivative, (high - low) / (2 * h), rtol=1e-6, atol=1e-7)


@every_schedule
def test_signal_falls_and_noise_grows_with_time(schedule: NoiseSchedule):
    log_snr = schedule.log_snr(torch.linspace(0.001, 1, 200, dtype=torch.float64))
    assert (log_snr.diff() < 0).all()


@every_schedule
def test_time_is_recovered_from_log_snr_and_from_timestep(schedule: NoiseSchedule):
    t = times()
    torch.testing.assert_close(schedule.time_from_log_snr(schedule.log_snr(t)), t, rtol=0, atol=1e-10)
    torch.testing.assert_close(schedule.time(schedule.timestep(t)), t, rtol=0, atol=1e-10)


@every_schedule
def test_coefficients_and_timesteps_are_float64_whatever_the_time_is(schedule: NoiseSchedule):
    t = torch.tensor([0.25, 0.5])
    assert t.dtype == torch.float32
    for values in (*schedule.coefficients(t), *schedule.derivatives(t), schedule.timestep(t), schedule.input_scale(t)):
        assert values.dtype == torch.float64
        assert values.shape == (2,)


@pytest.mark.parametrize("name", ["table", "zero_snr_table"])
def test_a_table_gives_its_own_numbers_at_its_entries(name: str):
    schedule = SCHEDULES[name]
    alpha, sigma = schedule.coefficients(schedule.time(torch.arange(1000)))
    torch.testing.assert_close(alpha**2, schedule.alphas_cumprod, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000, dtype=torch.float64), rtol=1e-14, atol=0)


def test_a_table_is_clean_at_time_zero_and_monotone_between_entries():
    schedule = SCHEDULES["table"]
    alpha, sigma = schedule.coefficients(torch.zeros(1))
    assert (alpha.item(), sigma.item()) == (1.0, 0.0)
    assert (schedule.coefficients(torch.linspace(0, 1, 12347, dtype=torch.float64)).sigma.diff() > 0).all()


def test_a_table_snaps_to_entries_and_never_to_the_clean_sample():
    schedule = SCHEDULES["table"]
    snapped = schedule.snap(torch.tensor([0.0, 1e-4, 0.02, 0.50049, 0.9999, 1.0], dtype=torch.float64))
    assert schedule.timestep(snapped).round().tolist() == [0, 0, 19, 499, 999, 999]
    torch.testing.assert_close(schedule.timestep(snapped), schedule.timestep(snapped).round(), rtol=0, atol=1e-9)


def test_zero_terminal_snr_leaves_no_signal_at_the_end():
    alpha, sigma = SCHEDULES["zero_snr_table"].coefficients(torch.ones(1))
    assert abs(alpha.item()) < 1e-15
    assert sigma.item() == 1.0


def test_the_edm_ramp_runs_from_sigma_min_to_sigma_max_and_starts_as_diffusers_does():
    schedule = EDMSchedule(sigma_min=0.01, sigma_max=50.0, rho=5.0, sigma_data=1.0)
    sigma = schedule.coefficients(torch.tensor([0.0, 1.0])).sigma
    torch.testing.assert_close(sigma, torch.tensor([0.01, 50.0], dtype=torch.float64), rtol=1e-12, atol=0)
    stock = diffusers.EDMEulerScheduler(sigma_min=0.01, sigma_max=50.0)
    assert schedule.initial_scale() == pytest.approx(float(stock.init_noise_sigma), rel=1e-6)


#: Stable Video Diffusion's.
CONTINUOUS = {
    "prediction_type": "v_prediction",
    "timestep_type": "continuous",
    "use_karras_sigmas": True,
    "sigma_min": 0.002,
    "sigma_max": 700.0,
}
NOISING = {
    "DDIM": diffusers.DDIMScheduler(**SD),
    "DDIM_zero_snr": diffusers.DDIMScheduler(**SD, rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    "DDPM": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample"),
    "DDPM_250": diffusers.DDPMScheduler(num_train_timesteps=250),
    "PNDM": diffusers.PNDMScheduler(**SD, skip_prk_steps=True),
    "LCM": diffusers.LCMScheduler(**SD),
    "DPMSolver": diffusers.DPMSolverMultistepScheduler(**SD, prediction_type="v_prediction"),
    "UniPC": diffusers.UniPCMultistepScheduler(**SD),
    "EDMEuler": diffusers.EDMEulerScheduler(),
    "EDMDPMSolver": diffusers.EDMDPMSolverMultistepScheduler(sigma_max=50.0, sigma_data=1.0),
    "EDMEuler_v": diffusers.EDMEulerScheduler(prediction_type="v_prediction"),
    "Euler_continuous_v": diffusers.EulerDiscreteScheduler(**SD, **CONTINUOUS),
}


def noised_by(scheduler, x0: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """A scheduler's own timesteps and what its own ``add_noise`` makes of ``x0`` at each of them."""
    timesteps = scheduler.timesteps
    return timesteps, torch.cat([scheduler.add_noise(x0, noise, t.reshape(1)) for t in timesteps])


@pytest.mark.parametrize("name", NOISING)
def test_a_scheduler_and_its_schedule_noise_alike_at_its_timesteps(name: str):
    scheduler = NOISING[name]
    schedule, _ = from_scheduler(scheduler)
    scheduler.set_timesteps(7)
    x0, noise = torch.randn(2, 1, 3, 4, 4)
    timesteps, theirs = noised_by(scheduler, x0, noise)
    count = len(timesteps)
    ours = add_noise(
        x0.expand(count, -1, -1, -1), noise.expand(count, -1, -1, -1), schedule.coefficients(schedule.time(timesteps))
    )
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler", "FlowMatchHeunDiscreteScheduler"]
)
def test_flow_schedulers_noise_alike_whatever_their_shift(name: str):
    scheduler = getattr(diffusers, name)(shift=3.0)
    schedule, kind = from_scheduler(scheduler)
    assert kind == "flow"
    scheduler.set_timesteps(5)
    x0, noise = torch.randn(2, 1, 3, 4, 4)
    for timestep in scheduler.timesteps.unique():
        scheduler.set_timesteps(5)  # some of them count the calls
        theirs = scheduler.scale_noise(x0, timestep.reshape(1), noise)
        ours = add_noise(x0, noise, schedule.coefficients(schedule.time(timestep.reshape(1))))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_multistep_schedulers_with_flow_sigmas_are_flow_up_to_their_rounding_of_timesteps(name: str):
    scheduler = getattr(diffusers, name)(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    schedule, kind = from_scheduler(scheduler)
    assert kind == "flow"
    scheduler.set_timesteps(7)
    x0, noise = torch.randn(2, 1, 3, 4, 4)
    for sigma, timestep in zip(scheduler.sigmas, scheduler.timesteps):
        theirs = scheduler.add_noise(x0, noise, timestep.reshape(1))
        torch.testing.assert_close(add_noise(x0, noise, schedule.coefficients(sigma.reshape(1))), theirs)
        assert abs(schedule.timestep(sigma).item() - timestep.item()) < 1


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"])
def test_schedulers_that_work_at_scale_sigma_feed_the_network_the_same_sample(name: str):
    scheduler = getattr(diffusers, name)(**SD)
    schedule, kind = from_scheduler(scheduler)
    assert kind == "epsilon"
    scheduler.set_timesteps(6)
    x0, noise = torch.randn(2, 1, 3, 4, 4)
    for timestep in scheduler.timesteps.unique():
        scheduler.set_timesteps(6)  # they count the calls
        ours = add_noise(x0, noise, schedule.coefficients(schedule.time(timestep.reshape(1))))
        noised = scheduler.add_noise(x0, noise, timestep.reshape(1))
        theirs = scheduler.scale_model_input(noised, timestep)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_prediction_types_are_the_schedulers_own():
    kinds = {name: from_scheduler(scheduler)[1] for name, scheduler in NOISING.items()}
    assert kinds == {
        "DDIM": "epsilon",
        "DDIM_zero_snr": "v_prediction",
        "DDPM": "sample",
        "DDPM_250": "epsilon",
        "PNDM": "epsilon",
        "LCM": "epsilon",
        "DPMSolver": "v_prediction",
        "UniPC": "epsilon",
        "EDMEuler": "edm",
        "EDMDPMSolver": "edm",
        "EDMEuler_v": "edm_v",
        "Euler_continuous_v": "edm_v",
    }


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_edm_preconditioning_is_that_of_the_scheduler(prediction_type: str):
    scheduler = diffusers.EDMEulerScheduler(prediction_type=prediction_type)
    schedule, kind = from_scheduler(scheduler)
    scheduler.set_timesteps(6)
    raw, x_t = torch.randn(2, 6, 3, 4, 4)
    sigma = scheduler.sigmas[:-1]
    t = schedule.time_from_sigma(sigma)
    broadcast = sigma.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(schedule.timestep(t).float(), scheduler.timesteps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        schedule.input_scale(t).float().reshape(-1, 1, 1, 1) * x_t, scheduler.precondition_inputs(x_t, broadcast)
    )
    torch.testing.assert_close(
        to_x0(raw, kind, x_t, schedule, t), scheduler.precondition_outputs(x_t, raw, broadcast), rtol=1e-5, atol=1e-5
    )


def test_a_continuous_euler_scheduler_is_an_edm_of_sigma_data_one():
    scheduler = diffusers.EulerDiscreteScheduler(**SD, **CONTINUOUS)
    schedule, kind = from_scheduler(scheduler)
    assert isinstance(schedule, EDMSchedule) and (schedule.sigma_max, schedule.sigma_data) == (700.0, 1.0)
    scheduler.set_timesteps(5)
    raw, sample = torch.randn(2, 1, 3, 4, 4)
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        t = schedule.time(timestep.reshape(1))
        assert float(schedule.coefficients(t).sigma) == pytest.approx(float(sigma), rel=1e-5)
        scaled = scheduler.scale_model_input(sample, timestep)
        torch.testing.assert_close(schedule.input_scale(t).float().reshape(1, 1, 1, 1) * sample, scaled)
        stepped = scheduler.step(raw, timestep, sample)
        ours = to_x0(raw, kind, sample, schedule, t)
        torch.testing.assert_close(ours, stepped.pred_original_sample, rtol=1e-4, atol=1e-4)


def test_an_scm_scheduler_is_trigflow():
    scheduler = diffusers.SCMScheduler()
    schedule, kind = from_scheduler(scheduler)
    assert isinstance(schedule, TrigFlowSchedule)
    scheduler.set_timesteps(2, max_timesteps=1.5, intermediate_timesteps=1.1)
    raw, x_t = torch.randn(2, 1, 3, 4, 4)
    stepped = scheduler.step(raw, scheduler.timesteps[0], x_t)
    ours = to_x0(raw, kind, x_t, schedule, schedule.time(scheduler.timesteps[:1]))
    torch.testing.assert_close(ours, stepped.pred_original_sample, rtol=1e-5, atol=1e-5)
    assert schedule.timestep(torch.ones(1)).item() == pytest.approx(math.pi / 2)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.EulerDiscreteScheduler(**{**CONTINUOUS, "use_karras_sigmas": False}),
        diffusers.EDMEulerScheduler(sigma_schedule="exponential"),
        diffusers.CMStochasticIterativeScheduler(),
        diffusers.VQDiffusionScheduler(16),
    ],
    ids=lambda scheduler: f"{type(scheduler).__name__}-{scheduler.config.get('prediction_type')}",
)
def test_schedulers_of_other_families_are_refused_by_name(scheduler):
    with pytest.raises(ValueError, match=type(scheduler).__name__):
        from_scheduler(scheduler)
