"""SiD's golden files (SiD, SiD-LSG, few-step SiD, SiDA), compared with the functions that the trainer is made of."""

import torch
from golden_file import GoldenFile
from torch import Tensor
from vocabulary import MORE, SPACES, TIME_WEIGHTS, denoising, error_weight

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.noise_levels import NoiseLevels
from fewstep.diffusion.prediction import add_noise
from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.diffusion.timesteps import even_grid
from fewstep.losses.adversarial import clamped_cross_entropy, weighted_mean
from fewstep.losses.score_identity import score_identity, score_identity_weight
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.trainers.sid import critic_weight

# --- SiD on EDM -------------------------------------------------------------------------------------------------------


def generator_edm(golden: GoldenFile) -> None:
    schedule = golden.edm_schedule()
    golden.choice("guidance_form", "none")
    student = golden.denoiser("k_student", schedule)
    sigma = golden["sigma_init"]
    sampler = Sampler(schedule, (schedule.time_from_sigma(sigma).item(),), "ode", sigma.item())
    y = rollout(student, sampler, golden["z"], golden.conditioning())
    golden.check("y", y)
    t = student_times(golden, schedule)
    golden.check("sigma", schedule.coefficients(t).sigma)
    loss, elements, _ = identity(golden, schedule, t, y, golden["noise"], golden["loss_scale"])
    if golden.expected("loss_elementwise"):
        golden.check("loss_elementwise", elements)
    golden.check("loss", loss)
    gradient_y, gradient_k = torch.autograd.grad(loss, (y, student.network.k))
    golden.check("grad_y", gradient_y)
    golden.check("grad_k_student", gradient_k)


def critic_edm(golden: GoldenFile) -> None:
    schedule = golden.edm_schedule()
    golden.choice("guidance_form", "none")
    t = critic_times(golden, schedule)
    golden.check("sigma", schedule.coefficients(t).sigma)
    critic = golden.denoiser("k_critic", schedule)
    loss = denoised(golden, schedule, critic, t, golden["y"], golden["noise"]) * golden.number("loss_factor")
    golden.check("loss", loss)
    golden.check("grad_k_critic", torch.autograd.grad(loss, critic.network.k)[0])


def sida(golden: GoldenFile) -> None:
    schedule = golden.edm_schedule()
    golden.choice("guidance_form", "none")
    golden.choice("gan_feature", "mean_channels_sin_x0_critic")
    golden.choice("gan_loss", "bce")
    critic, frequency = golden.denoiser("k_critic", schedule), golden.number("gan_feature_frequency")
    limit, conditioning = golden.number("logit_clamp"), golden.conditioning()
    y = golden["y"].clone().requires_grad_()

    def cross_entropy(x_t: Tensor, t: Tensor, real: bool) -> Tensor:
        logits = (frequency * critic(x_t, t, conditioning)).sin().mean(1)
        return clamped_cross_entropy(logits, real, limit)

    # The student: SiD's term, and the critic's features must look real under the same weights.
    t, noise = student_times(golden, schedule), golden["noise_gen"]
    loss, _, weight = identity(golden, schedule, t, y, noise, golden.number("loss_scale"))
    golden.check("loss_sid", loss)
    fooled = cross_entropy(add_noise(y, noise, schedule.coefficients(t)), t, real=True)
    adversarial = golden.number("gan_scale") * elements_of(golden, y) * weighted_mean(fooled, weight, over_batch=True)
    golden.check("loss_gan_generator", adversarial)
    total = golden.number("weight_sid") * loss + golden.number("weight_gan") * adversarial
    golden.check("loss_generator", total)
    golden.check("grad_y", torch.autograd.grad(total, y)[0])

    # The critic: denoising, and the discriminator at the same times and noise for real and fake.
    t, noise = critic_times(golden, schedule), golden["noise_critic"]
    loss = denoised(golden, schedule, critic, t, golden["y"], noise, "critic_")
    golden.check("loss_fake_score", loss)
    real, fake = (add_noise(golden[name], noise, schedule.coefficients(t)) for name in ("y_real", "y"))
    each = golden.number("discriminator_factor") * (cross_entropy(real, t, True) + cross_entropy(fake, t, False))
    adversarial = weighted_mean(each, error_weight(golden, schedule, t, "critic_"), over_batch=True)
    golden.check("loss_discriminator", adversarial)
    golden.check("grad_k_critic", torch.autograd.grad(loss + adversarial, critic.network.k)[0])


# --- SiD-LSG on a table -----------------------------------------------------------------------------------------------


def long_short_guidance(golden: GoldenFile) -> None:
    first = torch.tensor([golden.number("student_timestep")])
    timesteps = torch.cat([golden["timestep"], first])
    products = torch.cat([golden["alphas_cumprod_t"], golden["alphas_cumprod_init"].reshape(1)])
    schedule = golden.table_schedule(timesteps, products)
    golden.choice("student_input_scale", "sqrt(1-alphas_cumprod_init)")
    start = schedule.time(first)
    sampler = Sampler(schedule, (start.item(),), "ode", schedule.coefficients(start).sigma.item())
    student = golden.denoiser("k_student", schedule)
    y = rollout(student, sampler, golden["z"], golden.conditioning())
    golden.check("y", y)
    scale, t = as_ours(golden, golden["kappa"].item()), schedule.time(golden["timestep"])
    scales = {use: scale if golden.choice(use, True, False) else 1.0 for use in GUIDED}
    generator_and_critic(golden, schedule, t, student, y, scales)


# --- few-step SiD on flow matching ------------------------------------------------------------------------------------


def few_steps(golden: GoldenFile) -> None:
    schedule = golden.flow_schedule()
    golden.choice("rollout_gradient", "last_step")
    steps, last = golden["num_steps"].item(), golden["k_selected"].item() - 1
    z = golden["z"]
    step_noise = golden.choice("step_noise", "fresh", "fixed", "ddim")
    renoise = "ode" if step_noise == "ddim" else "fresh"
    sampler = Sampler(schedule, tuple(even_grid(steps, golden.number("shift")).tolist()), renoise)
    student, inputs = golden.denoiser("k_student", schedule), []
    y = rollout(
        student,
        sampler,
        z,
        golden.conditioning(),
        step_noise=lambda k: z if step_noise == "fixed" else golden["noises_rollout"][k - 1],
        last=last,
        on_step=lambda step, x_t: inputs.append(x_t),
    )
    golden.check("student_input", inputs[-1])
    golden.check("t_last", sampler.times(last, y))
    golden.check("y", y)
    t = student_times(golden, schedule)
    golden.check("sigma", schedule.coefficients(t).sigma)
    fake, real = (as_ours(golden, golden[f"kappa_{of}"].item()) for of in ("fake", "real"))
    kappas = dict(zip(GUIDED, (real, fake, fake)))
    scales = {use: kappa if golden.choice(use, True, False) else 1.0 for use, kappa in kappas.items()}
    generator_and_critic(golden, schedule, t, student, y, scales)


def generator_flow(golden: GoldenFile) -> None:
    """The one-step loss of a video model (Self-Forcing)."""
    schedule = golden.flow_schedule()
    levels = NoiseLevels("uniform", golden.number("t_min"), golden.number("t_max"), shift=golden["shift"].item())
    t = levels.times(golden["timestep_raw"] / golden.number("timestep_scale"), schedule)
    golden.check("sigma", schedule.coefficients(t).sigma)
    form = golden.choice("guidance_form", *MORE)
    scale = as_ours(golden, golden["guidance_extra"].item()) if form != "none" else 1.0
    golden.choice("guidance_space", "x0", "epsilon", "velocity")  # which at one x_t are the same
    guided = [scale if golden.choice(use, True, False) else 1.0 for use in ("guide_teacher", "guide_critic")]
    y = golden["y"].clone().requires_grad_()
    loss, _, _ = identity(golden, schedule, t, y, golden["noise"], 1.0, *guided)
    golden.check("loss", loss)
    golden.check("grad_y", torch.autograd.grad(loss, y)[0])


def as_ours(golden: GoldenFile, kappa: float) -> float:
    """The guidance scale of u + w (c - u) that the file's form means."""
    more = MORE[golden.choice("guidance_form", *MORE)]
    return 1.0 if more is None else kappa + more


# --- what they share --------------------------------------------------------------------------------------------------

GUIDED = ("guide_teacher", "guide_critic", "guide_critic_in_critic_loss")


def generator_and_critic(
    golden: GoldenFile, schedule: NoiseSchedule, t: Tensor, student: Denoiser, y: Tensor, scales: dict[str, float]
) -> None:
    """Both losses at one time and noise."""
    scale, noise = golden.number("loss_scale"), golden["noise"]
    guided = (scales["guide_teacher"], scales["guide_critic"])
    loss, _, _ = identity(golden, schedule, t, y, noise, scale, *guided, told=True)
    golden.check("loss_generator", loss)
    gradient_y, gradient_k = torch.autograd.grad(loss, (y, student.network.k))
    golden.check("grad_y", gradient_y)
    golden.check("grad_k_student", gradient_k)

    critic = golden.denoiser("k_critic", schedule)
    loss = denoised(golden, schedule, critic, t, y.detach(), noise, "critic_", scales["guide_critic_in_critic_loss"])
    golden.check("loss_critic", loss)
    golden.check("grad_k_critic", torch.autograd.grad(loss, critic.network.k)[0])


def identity(
    golden: GoldenFile,
    schedule: NoiseSchedule,
    t: Tensor,
    y: Tensor,
    noise: Tensor,
    scale: float | Tensor,
    guide_teacher: float = 1.0,
    guide_critic: float = 1.0,
    told: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """SiD's loss (), its elements (B, ...) and the weights (B,); with ``told`` teacher and critic are compared too."""
    through = golden.choice("differentiate_networks", True, False)
    golden.choice("normalizer_detached", True)
    coefficients, conditioning = schedule.coefficients(t), golden.conditioning()
    x_t = add_noise(y if through else y.detach(), noise, coefficients)
    x0_teacher = guided(golden, "k_teacher", schedule, guide_teacher)(x_t, t, conditioning)
    x0_critic = guided(golden, "k_critic", schedule, guide_critic)(x_t, t, conditioning)
    if told:
        golden.check("x0_teacher", x0_teacher)
        golden.check("x0_critic", x0_critic)
    over = elements_of(golden, y)

    def under(weighting: str) -> tuple[Tensor, Tensor, Tensor]:
        weight = score_identity_weight(
            NAMES.get(weighting, weighting), y, x0_teacher, coefficients, normalizer_min(golden)
        )
        elements = score_identity(y, x0_teacher, x0_critic, golden["alpha"].item(), weight)
        return scale * over * elements.mean(), elements, weight

    for name in golden.expected(r"loss\.\w+"):
        golden.check(name, under(name.removeprefix("loss."))[0])
    return under(weighting_of(golden))


# What the files call weights that have other names here.
NAMES = {
    "sid_legacy": "sid",
    "mean_abs_y_minus_x0_teacher": "sid",
    "mean_abs_x_minus_x0_teacher": "sid",
    "uniform": "none",
}


def weighting_of(golden: GoldenFile) -> str:
    """The weighting of the generator's loss, which is named, or is that of a normaliser."""
    if not golden.absent("weighting"):
        known = ("1_minus_sigma", "1_minus_sigma_squared", "1_over_sigma", "1_over_sigma2", "snr_sqrt", "snr")
        return golden.choice("weighting", "sid_legacy", "uniform", *known)
    if not golden.absent("normalizer_dtype"):
        golden.choice("normalizer_dtype", "float32", "float64")  # a cast of the source, below its own tolerance
    return golden.choice("normalizer", "mean_abs_y_minus_x0_teacher", "mean_abs_x_minus_x0_teacher", "none")


def normalizer_min(golden: GoldenFile) -> float:
    return 1e-5 if golden.absent("normalizer_min") else golden.number("normalizer_min")


def denoised(
    golden: GoldenFile,
    schedule: NoiseSchedule,
    critic: Denoiser,
    t: Tensor,
    y: Tensor,
    noise: Tensor,
    prefix: str = "",
    scale: float = 1.0,
) -> Tensor:
    """The critic's loss ()."""
    x0 = GuidedDenoiser(critic, scale)(add_noise(y, noise, schedule.coefficients(t)), t, golden.conditioning())
    kind, named = critic.prediction_type, f"{prefix}distance"
    distance = "mse_x0" if golden.absent(named) else golden.choice(named, "mse", *SPACES)
    if TRAINED.get(kind) == (distance, golden.choice(f"{prefix}weighting", *TIME_WEIGHTS)):
        weight = error_weight(golden, schedule, t, prefix)
        torch.testing.assert_close(critic_weight(kind, schedule, t), weight, rtol=1e-12, atol=0)
    return denoising(golden, schedule, t, y, x0, prefix)


#: What the trainer's critics learn by: the error of the network's own output, of v networks that of the noise.
TRAINED = {
    "epsilon": ("mse_epsilon", "uniform"),
    "v_prediction": ("mse_v", "snr/(snr+1)"),
    "flow": ("mse_velocity", "uniform"),
    "edm": ("mse_x0", "karras"),
}


def guided(golden: GoldenFile, coefficients: str, schedule: NoiseSchedule, scale: float) -> GuidedDenoiser:
    return GuidedDenoiser(golden.denoiser(coefficients, schedule), scale)


def elements_of(golden: GoldenFile, y: Tensor) -> float:
    """What turns a mean over everything into the file's reduction."""
    return golden.over_mean(y)


def student_times(golden: GoldenFile, schedule: NoiseSchedule) -> Tensor:
    sampler = golden.choice("time_sampler", "karras", "logit_normal", "log_normal")
    if sampler == "karras":  # uniform on the lower part of the ramp
        return NoiseLevels("uniform", 0.0, golden.number("uniform_scale")).times(golden["uniform"], schedule)
    return normal_times(golden, sampler, schedule)


def critic_times(golden: GoldenFile, schedule: NoiseSchedule) -> Tensor:
    name = "time_sampler" if golden.absent("critic_time_sampler") else "critic_time_sampler"
    return normal_times(golden, golden.choice(name, "log_normal", "logit_normal"), schedule)


def normal_times(golden: GoldenFile, kind: str, schedule: NoiseSchedule) -> Tensor:
    levels = NoiseLevels(kind, mean=golden.number("p_mean"), std=golden.number("p_std"))
    return levels.times(golden["normal"], schedule)


CASES = {
    "sid_generator_edm": generator_edm,
    "sid_critic_edm": critic_edm,
    "sid_generator_flow": generator_flow,
    "sida_losses_edm": sida,
    "siddit_losses_flow": few_steps,
    "sidlsg_losses_vp": long_short_guidance,
}
