"""DMD2's golden files, compared with the functions that the trainer is made of."""

import torch
import torch.nn.functional as F
from golden_file import GoldenFile
from matching_cases import normalization
from torch import Tensor
from vocabulary import MORE, denoising, guided

from fewstep.diffusion.prediction import add_noise
from fewstep.diffusion.rescaling import Rescaling
from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.losses.adversarial import discriminator_loss, generator_loss
from fewstep.losses.score import Matching, distribution_matching, score_distillation
from fewstep.networks.guidance import guide


def generator_edm(golden: GoldenFile) -> None:
    schedule = golden.edm_schedule()
    t = golden.edm_time(golden["sigma_index"])
    golden.check("sigma", schedule.coefficients(t).sigma)
    matching(golden, schedule, t)


def generator_vp(golden: GoldenFile) -> None:
    schedule = golden.table_schedule(golden["timestep"], golden["alphas_cumprod_t"])
    matching(golden, schedule, schedule.time(golden["timestep"]))


def matching(golden: GoldenFile, schedule: NoiseSchedule, t: Tensor) -> None:
    """The distribution-matching loss from the noised sample to the gradient."""
    golden.choice("differentiate_networks", False)
    x, conditioning = golden["x"], golden.conditioning()
    teacher, critic = golden.denoiser("k_teacher", schedule), golden.denoiser("k_critic", schedule)
    x_t = add_noise(x, golden["noise"], schedule.coefficients(t))
    golden.check("x_noisy", x_t)
    x0_teacher = guided(golden, teacher, "guide_teacher")(x_t, t, conditioning)
    if not golden.absent("guide_critic"):
        critic = guided(golden, critic, "guide_critic")
    x0_critic = critic(x_t, t, conditioning)
    *unguided, name = golden.expected("x0_teacher(_cfg)?")
    golden.check(name, x0_teacher)
    for name in unguided:
        golden.check(name, teacher(x_t, t, conditioning))
    golden.check("x0_critic", x0_critic)
    loss, gradient = matched(golden, x, x0_teacher, x0_critic)
    factor = golden.loss_factor(x)
    golden.check("loss", factor * loss)
    golden.check("grad_x", factor * gradient)
    golden.check("dm_direction", gradient * x.numel())


def matched(
    golden: GoldenFile, x: Tensor, x0_teacher: Tensor, x0_critic: Tensor, clip: float | None = None
) -> Matching:
    """The project's own loss and gradient, under the file's normaliser."""
    if golden.absent("normalizer"):
        return score_distillation(x0_teacher, x0_critic, torch.ones(len(x), dtype=torch.float64))
    bounds = normalization(golden, "x") if clip is None else {"normalizer_min": clip}
    golden.choice("normalizer", "mean_abs_x_minus_x0_teacher")
    return distribution_matching(x, x0_teacher, x0_critic, **bounds)


def critic_edm(golden: GoldenFile) -> None:
    critic_loss(golden, golden.edm_schedule(), golden.edm_time(golden["sigma_index"]))


def critic_vp(golden: GoldenFile) -> None:
    schedule = golden.table_schedule(golden["timestep"], golden["alphas_cumprod_t"])
    critic_loss(golden, schedule, schedule.time(golden["timestep"]))


def critic_loss(golden: GoldenFile, schedule: NoiseSchedule, t: Tensor) -> None:
    critic = golden.denoiser("k_critic", schedule)
    x_t = add_noise(golden["x"], golden["noise"], schedule.coefficients(t))
    x0_critic = guided(golden, critic)(x_t, t, golden.conditioning())
    for name in golden.expected("x0_critic"):
        golden.check(name, x0_critic)
    loss = golden.number("loss_factor") * denoising(golden, schedule, t, golden["x"], x0_critic)
    loss.backward()
    golden.check("loss", loss)
    golden.check("grad_k_critic", critic.network.k.grad)


def gan_edm(golden: GoldenFile) -> None:
    schedule = golden.edm_schedule()
    golden.choice("gan_feature", "x0_critic")
    golden.choice("gan_head", "conv1x1_mean_hw")
    golden.choice("gan_loss", "non_saturating_softplus")
    golden.choice("reduction", "mean")
    factor = golden.number("loss_factor")
    critic = guided(golden, golden.denoiser("k_critic", schedule))
    weight = golden["head_weight"].clone().requires_grad_()

    def logits(x: Tensor, use: str, label: str) -> Tensor:
        t = golden.edm_time(golden[f"index_{use}"])
        x_t = add_noise(x, golden[f"noise_{use}"], schedule.coefficients(t))
        features = critic(x_t, t, golden.conditioning(f"cond_{label}"))
        return F.conv2d(features, weight, golden["head_bias"]).mean((1, 2, 3))

    fake = golden["x_fake"].clone().requires_grad_()
    loss = factor * generator_loss(logits(fake, "gen", "fake"))
    golden.check("loss_generator", loss)
    golden.check("grad_x_fake", torch.autograd.grad(loss, fake)[0])

    loss = factor * discriminator_loss(logits(golden["x_real"], "real", "real"), logits(fake.detach(), "fake", "fake"))
    golden.check("loss_discriminator", loss)
    golden.check("grad_head_weight", torch.autograd.grad(loss, weight)[0])


def backward_simulation(golden: GoldenFile) -> None:
    golden.choice("first_input", "pure_noise")
    golden.choice("final_noise", "independent")
    renoise = {"sde": "fresh"}[golden.choice("renoise", "sde")]
    timesteps = golden["student_timesteps"]
    schedule = golden.table_schedule(timesteps, golden["alphas_cumprod"])
    sampler = Sampler(schedule, tuple(schedule.time(timesteps).tolist()), renoise)
    student = guided(golden, golden.denoiser("k_student", schedule))
    simulated, final = golden.inputs("noise_sim"), golden["noise_final"]
    for last, timestep in enumerate(timesteps):
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []

        def watched(x_t: Tensor, t: Tensor, conditioning, end: Tensor, outputs=outputs) -> Tensor:
            outputs.append(student(x_t, t, conditioning))
            return outputs[-1]

        x0 = rollout(
            watched,
            sampler,
            # The source draws the noise of the graded step apart from those of the simulation.
            noise=final if last == 0 else simulated[0],
            conditioning=golden.conditioning(),
            step_noise=lambda k, last=last: final if k == last else simulated[k],
            last=last,
            on_step=lambda step, x_t, inputs=inputs: inputs.append(x_t),
        )
        golden.check(f"k{last}.student_input", inputs[-1])
        golden.check(f"k{last}.timestep", timestep.expand(len(x0)))
        golden.check(f"k{last}.x0", x0)
        for step, simulated_x0 in enumerate(outputs[:-1]):
            golden.check(f"k{last}.x0_step{step}", simulated_x0)


def loss_and_rescaled_guidance(golden: GoldenFile) -> None:
    golden.choice("normalizer_clip", "lower_bound")
    factor = golden.loss_factor(golden["x"])
    loss, gradient = matched(golden, golden["x"], golden["x0_teacher"], golden["x0_critic"], golden["clip"].item())
    golden.check("loss", factor * loss)
    golden.check("grad_x", factor * gradient)

    more = MORE[golden.choice("guidance_form", *MORE)]
    scale = 1.0 if more is None else golden["scale"] + more
    golden.choice("rescale_layer_norm_axis", "last_dim")
    golden.choice("rescale_scalar_axis", "whole_tensor")
    guided = guide(golden["cond_pred"], golden["uncond_pred"], scale)
    golden.check("cfg_none", guided)
    golden.check("cfg_layer_norm", Rescaling("tokens")(guided, golden["cond_pred"]))
    golden.check("cfg_scalar", Rescaling("whole")(guided[None], golden["cond_pred"][None])[0])


CASES = {
    "dmd2_generator_edm": generator_edm,
    "dmd2_generator_vp": generator_vp,
    "dmd2_critic_edm": critic_edm,
    "dmd2_critic_vp": critic_vp,
    "dmd2_gan_edm": gan_edm,
    "dmd2_backward_simulation": backward_simulation,
    "dmd_loss_and_cfg_rescale": loss_and_rescaled_guidance,
}
