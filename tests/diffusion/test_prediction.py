"""Conversions between what networks predict, guidance on them, and the one step rule, against stock schedulers."""

import diffusers
import pytest
import torch
from torch import Tensor

from fewstep.diffusion.prediction import KINDS, add_noise, convert, from_x0, noise_from_x0, ode_step, to_x0, x0_map
from fewstep.diffusion.rescaling import Rescaling
from fewstep.diffusion.schedule import EDMSchedule, NoiseSchedule, from_scheduler
from fewstep.networks.guidance import guide
from tests.diffusion.test_schedule import SCHEDULES, SD, every_schedule

TIMES = torch.tensor([0.02, 0.25, 0.5, 0.777, 0.98], dtype=torch.float64)


def kinds_of(schedule: NoiseSchedule) -> list[str]:
    return [kind for kind in KINDS if not kind.startswith("edm") or isinstance(schedule, EDMSchedule)]


def samples(count: int) -> list[Tensor]:
    return list(torch.randn(count, len(TIMES), 2, 3, 3, dtype=torch.float64))


@every_schedule
def test_every_kind_round_trips_through_every_other(schedule: NoiseSchedule):
    x0, noise = samples(2)
    x_t = add_noise(x0, noise, schedule.coefficients(TIMES))
    for source in kinds_of(schedule):
        raw = from_x0(x0, source, x_t, schedule, TIMES)
        torch.testing.assert_close(to_x0(raw, source, x_t, schedule, TIMES), x0, rtol=1e-10, atol=1e-10)
        for target in kinds_of(schedule):
            there = convert(raw, source, target, x_t, schedule, TIMES)
            torch.testing.assert_close(
                convert(there, target, source, x_t, schedule, TIMES), raw, rtol=1e-10, atol=1e-10
            )


@every_schedule
def test_raw_outputs_are_what_their_kind_says(schedule: NoiseSchedule):
    x0, noise = samples(2)
    alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in schedule.coefficients(TIMES))
    x_t = add_noise(x0, noise, schedule.coefficients(TIMES))
    truth = {
        "epsilon": noise,
        "v_prediction": alpha * noise - sigma * x0,
        "sample": x0,
        "flow": noise - x0,
    }
    for kind, raw in truth.items():
        torch.testing.assert_close(from_x0(x0, kind, x_t, schedule, TIMES), raw, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(noise_from_x0(x0, x_t, schedule.coefficients(TIMES)), noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["v_prediction", "sample", "flow"])
@pytest.mark.parametrize("name", ["zero_snr_table", "flow", "trigflow"])
def test_kinds_that_know_x0_in_pure_noise_stay_finite_there(name: str, kind: str):
    t = torch.ones(1, dtype=torch.float64)
    x0, noise = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    schedule = SCHEDULES[name]
    x_t = add_noise(x0, noise, schedule.coefficients(t))
    raw = from_x0(x0, kind, x_t, schedule, t)
    torch.testing.assert_close(to_x0(raw, kind, x_t, schedule, t), x0, rtol=1e-10, atol=1e-10)


@every_schedule
def test_guidance_commutes_with_every_conversion(schedule: NoiseSchedule):
    positive, negative, x_t = samples(3)
    for source in kinds_of(schedule):
        for target in kinds_of(schedule):
            one_way = convert(guide(positive, negative, 7.5), source, target, x_t, schedule, TIMES)
            other_way = guide(
                convert(positive, source, target, x_t, schedule, TIMES),
                convert(negative, source, target, x_t, schedule, TIMES),
                7.5,
            )
            torch.testing.assert_close(one_way, other_way, rtol=1e-9, atol=1e-9 * float(one_way.abs().max()))


@pytest.mark.parametrize("rescale", [Rescaling("tokens"), Rescaling("whole")], ids=["tokens", "whole"])
def test_rescaled_guidance_does_not_commute_with_conversions(rescale):
    positive, negative, x_t = samples(3)
    schedule = SCHEDULES["flow"]

    def to_clean(raw: Tensor) -> Tensor:
        return to_x0(raw, "flow", x_t, schedule, TIMES)

    raw_space = to_clean(rescale(guide(positive, negative, 4.0), positive))
    x0_space = rescale(guide(to_clean(positive), to_clean(negative), 4.0), to_clean(positive))
    assert (raw_space - x0_space).abs().max() > 0.1


def test_rescaling_restores_the_norm_per_token_and_only_ever_shrinks_as_a_whole():
    positive, guided = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(Rescaling("tokens")(guided, positive).norm(dim=-1), positive.norm(dim=-1))
    whole = Rescaling("whole")
    norms = [each.flatten(1).norm(dim=1) for each in (whole(3 * guided, positive), positive)]
    torch.testing.assert_close(*norms)
    torch.testing.assert_close(whole(0.01 * guided, positive), 0.01 * guided)


def test_conversions_keep_the_dtype_of_the_sample():
    x_t = torch.randn(5, 2, 3, 3)
    for kind in kinds_of(SCHEDULES["flow"]):
        assert to_x0(x_t.bfloat16(), kind, x_t, SCHEDULES["flow"], TIMES).dtype == torch.float32


@pytest.mark.parametrize(("kind", "name"), [("velocity", "flow"), ("edm", "flow")])
def test_a_kind_that_the_schedule_does_not_know_is_refused(kind: str, name: str):
    with pytest.raises(ValueError, match=f"unknown prediction type '{kind}'"):
        x0_map(kind, SCHEDULES[name], TIMES)


# --- the one step rule -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_the_step_is_ddims(kind: str, spacing: str):
    scheduler = diffusers.DDIMScheduler(**SD, prediction_type=kind, clip_sample=False, timestep_spacing=spacing)
    schedule, found = from_scheduler(scheduler)
    assert found == kind
    scheduler.set_timesteps(5)
    raw, x_t = torch.randn(2, 1, 3, 4, 4)
    for timestep in scheduler.timesteps:
        stepped = scheduler.step(raw, timestep, x_t)
        t = schedule.time(timestep.reshape(1))
        then = (t - 1 / 5).clamp(min=0)  # 1000 / 5 entries back; beyond the first lies the clean sample
        x0 = to_x0(raw, kind, x_t, schedule, t)
        ours = ode_step(x_t, x0, schedule.coefficients(t), schedule.coefficients(then))
        torch.testing.assert_close(x0, stepped.pred_original_sample, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours, stepped.prev_sample, rtol=1e-4, atol=1e-4)


def test_the_step_is_flow_matchings_euler_step():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule, kind = from_scheduler(scheduler)
    scheduler.set_timesteps(5)
    raw, x_t = torch.randn(2, 1, 3, 4, 4)
    for k, timestep in enumerate(scheduler.timesteps):
        now, then = (schedule.coefficients(s.reshape(1)) for s in scheduler.sigmas[k : k + 2])
        ours = ode_step(x_t, to_x0(raw, kind, x_t, schedule, now.sigma), now, then)
        torch.testing.assert_close(ours, scheduler.step(raw, timestep, x_t).prev_sample, rtol=1e-5, atol=1e-5)


def test_the_step_is_edms_euler_step():
    scheduler = diffusers.EDMEulerScheduler()
    schedule, kind = from_scheduler(scheduler)
    scheduler.set_timesteps(5)
    raw, x_t = torch.randn(2, 1, 3, 4, 4)
    for k, timestep in enumerate(scheduler.timesteps):
        now, then = (schedule.coefficients(schedule.time_from_sigma(s.reshape(1))) for s in scheduler.sigmas[k : k + 2])
        then = then._replace(sigma=scheduler.sigmas[k + 1].double().reshape(1))  # the ramp ends above 0, the walk at 0
        x0 = to_x0(raw, kind, x_t, schedule, schedule.time_from_sigma(scheduler.sigmas[k].reshape(1)))
        stepped = scheduler.step(raw, timestep, x_t)
        torch.testing.assert_close(x0, stepped.pred_original_sample, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ode_step(x_t, x0, now, then), stepped.prev_sample, rtol=1e-4, atol=1e-3)


@every_schedule
def test_a_step_along_the_true_noise_lands_on_the_same_path(schedule: NoiseSchedule):
    x0, noise = samples(2)
    now, then = schedule.coefficients(TIMES), schedule.coefficients(TIMES / 2)
    stepped = ode_step(add_noise(x0, noise, now), x0, now, then)
    torch.testing.assert_close(stepped, add_noise(x0, noise, then), rtol=1e-9, atol=1e-9)
