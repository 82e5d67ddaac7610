"""Golden files of DMD2's relatives: f-distill, SwiftBrush and Phased DMD."""

import torch
from golden_file import GoldenFile
from toy_network import toy_conditioning
from vocabulary import TIME_WEIGHTS, guided, time_weight
from vocabulary import denoising as critic_denoising

from fewstep.diffusion.prediction import add_noise, from_x0, transition
from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.diffusion.schedule import Coefficients, EDMSchedule, FlowSchedule, NoiseSchedule, TrigFlowSchedule
from fewstep.losses.divergence import DIVERGENCES, DivergenceWeight
from fewstep.losses.score import (
    distribution_matching,
    score_distillation,
    subinterval_target,
)


def f_distill(golden: GoldenFile) -> None:
    golden.choice("head_reduction", "mean")
    golden.choice("rkl_weight", "ones")
    golden.choice("weight_norm", "batch_mean")
    names = {
        "bin_eps": "bin_eps",
        "bin_init": "bin_start",
        "bin_momentum": "momentum",
        "bin_t_max": "t_max",
        "bin_t_min": "t_min",
        "logit_clamp": "logit_clamp",
        "ratio_max": "ratio_max",
        "ratio_min": "ratio_min",
        "weight_norm_eps": "eps",
    }
    settings = {ours: golden.number(theirs) for theirs, ours in names.items() if not golden.absent(theirs)}
    bins = 0 if golden.absent("num_bins") else golden.number("num_bins")
    normalizer = normalization(golden, "x")
    factor = golden.loss_factor(golden["x"])
    weights: dict[str, torch.Tensor | None] = {"plain": None}
    for divergence in DIVERGENCES:
        for suffix, count in (("", 0), (".binned", bins)):
            weigh = DivergenceWeight(divergence, count, **settings)
            weights[divergence + suffix] = weigh(golden["logits"], golden["t"])
            if count and golden.expected("bins"):
                golden.check("bins", weigh.bins)
    for name in golden.expected(r"h\..+"):
        golden.check(name, weights[name.removeprefix("h.")])
    for name in golden.expected(r"loss\..+"):
        weight = weights[name.removeprefix("loss.")]
        loss, gradient = distribution_matching(
            golden["x"], golden["x0_teacher"], golden["x0_critic"], weight=weight, **normalizer
        )
        golden.check(name, factor * loss)
        golden.check(name.replace("loss", "grad_x"), factor * gradient)


def normalization(golden: GoldenFile, sample: str) -> dict[str, float]:
    """What bounds the normaliser of distribution matching, as keywords of the trainer's function."""
    golden.choice("normalizer", f"mean_abs_{sample}_minus_x0_teacher")
    names = ("normalizer_min", "normalizer_eps")
    return {name: golden.number(name) for name in names if not golden.absent(name)}


def swiftbrush(golden: GoldenFile) -> None:
    conditioning, null = golden.conditioning(), toy_conditioning(torch.zeros(len(golden["cond"]), dtype=torch.float64))
    golden.choice("differentiate_networks", False)

    # The student: pure noise at one timestep whose abar is a number of the source's, not of its table.
    timestep = torch.tensor([golden.number("student_timestep")])
    abar = torch.tensor(golden.number("student_alphas_cumprod"), dtype=torch.float64)
    at = golden.table_schedule(timestep, abar, exactly=False)
    student = golden.denoiser("k_student", at)
    y = rollout(student, Sampler(at, tuple(at.time(timestep).tolist()), "fresh"), golden["z"], conditioning)
    golden.check("y", y)

    schedule = golden.table_schedule(golden["timestep_vsd"], golden["abar_vsd"])
    teacher, critic = golden.denoiser("k_teacher", schedule), golden.denoiser("k_critic", schedule)
    t = schedule.time(golden["timestep_vsd"])
    x_t = add_noise(y.detach(), golden["noise_vsd"], schedule.coefficients(t))
    x0_teacher = guided(golden, teacher, "guide_teacher")(x_t, t, conditioning)
    x0_critic = guided(golden, critic, "guide_critic")(x_t, t, conditioning)
    alpha, sigma = schedule.coefficients(t)
    # Of the difference of the two noises; the trainer's function is SwiftBrush's own choice, sigma^2.
    weight = time_weight(golden.choice("weighting", *TIME_WEIGHTS), schedule, t) * alpha / sigma
    if not golden.absent("normalizer"):
        normalizer = normalization(golden, "y")
        loss, gradient = distribution_matching(y.detach(), x0_teacher, x0_critic, weight=weight, **normalizer)
    else:
        loss, gradient = score_distillation(x0_teacher, x0_critic, weight)
    factor = golden.loss_factor(y)
    golden.check("loss_vsd", factor * loss)
    golden.check("grad_y", factor * gradient)
    y.backward(factor * gradient)
    golden.check("grad_k_student", student.network.k.grad)

    schedule = golden.table_schedule(golden["timestep_critic"], golden["abar_critic"])
    critic = golden.denoiser("k_critic", schedule)
    t = schedule.time(golden["timestep_critic"])
    x_t = add_noise(y.detach(), golden["noise_critic"], schedule.coefficients(t))
    said = guided(golden, critic, "guide_critic_in_critic_loss")
    x0_critic = said(x_t, t, null if golden["critic_uses_null"] else conditioning)
    loss = critic_denoising(golden, schedule, t, y.detach(), x0_critic, "critic_")
    golden.check("loss_critic", loss)
    (gradient,) = torch.autograd.grad(loss, critic.network.k)
    golden.check("grad_k_critic", gradient)


def phased_target(golden: GoldenFile) -> None:
    schedule, s, t = phased_times(golden)
    at_s, at_t = schedule.coefficients(s), schedule.coefficients(t)
    if isinstance(schedule, EDMSchedule):  # whose ramp does not begin at 0
        at_s = Coefficients(torch.ones_like(s), golden["s"].double())
    least = 0.0 if golden.absent("variance_min") else golden.number("variance_min")
    step = transition(at_s, at_t, least)
    x_s, noise = golden["x_s"], golden["noise"]
    x_t = add_noise(x_s, noise, step)
    golden.check("alpha_ts", step.alpha)
    golden.check("sigma_ts", step.sigma)
    golden.check("x_t", x_t)
    target = subinterval_target(x_s, noise, at_s, at_t, least)
    kinds = {
        "velocity": lambda: target.noise - target.x0,
        "data_minus_noise": lambda: target.x0 - target.noise,
        "epsilon": lambda: target.noise,
        "sample": lambda: target.x0,
        "v_prediction": lambda: add_noise(target.noise, -target.x0, at_t),
        "trigflow": lambda: add_noise(target.noise, -target.x0, at_t),
        "edm_preconditioned": lambda: from_x0(target.x0, "edm", x_t, schedule, t),
    }
    said = kinds[golden.choice("prediction_type", *kinds)]()
    (name,) = golden.expected(r"\w+_target")
    golden.check(name, target.x0 if name == "x0_target" else said)


def phased_times(golden: GoldenFile) -> tuple[NoiseSchedule, torch.Tensor, torch.Tensor]:
    """The schedule of the options, and the file's two times as ours."""
    kind = golden.choice("schedule", "rf", "edm", "vp", "trigflow")
    s, t = golden["s"], golden["t"]
    if kind == "vp":
        steps = torch.cat([s, t]).long()
        schedule: NoiseSchedule = golden.table_schedule(steps, torch.cat([golden["abar_s"], golden["abar_t"]]))
        return schedule, schedule.time(s), schedule.time(t)
    if kind == "edm":
        data = {} if golden.absent("sigma_data") else {"sigma_data": golden.number("sigma_data")}
        edm = EDMSchedule(sigma_min=1e-3, sigma_max=100.0, **data)
        return edm, edm.time_from_sigma(s), edm.time_from_sigma(t)
    schedule = FlowSchedule(1.0) if kind == "rf" else TrigFlowSchedule()
    return schedule, schedule.time(s), schedule.time(t)


CASES = {
    "f_distill_weights_and_loss": f_distill,
    "swiftbrush_losses": swiftbrush,
    "phased_dmd_velocity_target": phased_target,
}
