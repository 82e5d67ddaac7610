"""DMD2's golden files, compared with the functions that the trainer is made of."""

import torch
import torch.nn.functional as F
from golden_file import GoldenFile
from torch import Tensor
from toy_network import toy_conditioning

from fewstep.diffusion.prediction import add_noise
from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.losses.adversarial import discriminator_loss, generator_loss
from fewstep.losses.score import denoising_loss, distribution_matching, native_weight
from fewstep.networks.guidance import GuidedDenoiser, guide, rescale_last_axis, rescale_norm


def generator_edm(golden: GoldenFile) -> None:
    schedule = golden.edm_schedule()
    t = golden.edm_time(golden["sigma_index"])
    golden.check("sigma", schedule.coefficients(t).sigma)
    golden.choice("guidance_form", "none")
    matching(golden, schedule, t, golden.denoiser("k_teacher", schedule), "x0_teacher")


def generator_vp(golden: GoldenFile) -> None:
    schedule = golden.table_schedule(golden["timestep"], golden["alphas_cumprod_t"])
    teacher = golden.denoiser("k_teacher", schedule)
    golden.choice("guide_critic", False)
    name = "x0_teacher"
    if golden.choice("guide_teacher", True, False):
        golden.choice("guidance_form", "u+w*(c-u)")
        null = toy_conditioning(torch.zeros(1, dtype=torch.float64))
        teacher = GuidedDenoiser(teacher, null, golden["guidance_scale"].item())
        name = "x0_teacher_cfg"
    else:
        golden.choice("guidance_form", "none")
    matching(golden, schedule, schedule.time(golden["timestep"]), teacher, name)


def matching(
    golden: GoldenFile, schedule: NoiseSchedule, t: Tensor, teacher: GuidedDenoiser, teacher_name: str
) -> None:
    """The distribution-matching loss from the noised sample to the gradient."""
    golden.choice("differentiate_networks", False)
    golden.choice("loss_factor", 0.5)
    golden.choice("normalizer", "mean_abs_x_minus_x0_teacher")
    golden.choice("reduction", "mean")
    x, conditioning = golden["x"], golden.conditioning()
    x_t = add_noise(x, golden["noise"], schedule.coefficients(t))
    golden.check("x_noisy", x_t)
    x0_teacher = teacher(x_t, t, conditioning)
    x0_critic = golden.denoiser("k_critic", schedule)(x_t, t, conditioning)
    golden.check(teacher_name, x0_teacher)
    golden.check("x0_critic", x0_critic)
    loss, gradient = distribution_matching(x, x0_teacher, x0_critic, golden.number("normalizer_min"))
    golden.check("loss", loss)
    golden.check("grad_x", gradient)
    golden.check("dm_direction", gradient * x.numel())


def critic_edm(golden: GoldenFile) -> None:
    schedule = golden.edm_schedule()
    golden.choice("distance", "mse_x0")
    golden.choice("weighting", "karras")
    denoising(golden, schedule, golden.edm_time(golden["sigma_index"]))


def critic_vp(golden: GoldenFile) -> None:
    schedule = golden.table_schedule(golden["timestep"], golden["alphas_cumprod_t"])
    # A uniform weight on the error of the network's own output is what native_weight gives.
    own_space = {"epsilon": "mse_epsilon", "v_prediction": "mse_v"}
    golden.choice("distance", own_space[golden.choice("prediction_type", *own_space)])
    golden.choice("weighting", "uniform")
    denoising(golden, schedule, schedule.time(golden["timestep"]))


def denoising(golden: GoldenFile, schedule: NoiseSchedule, t: Tensor) -> None:
    golden.choice("guidance_form", "none")
    golden.choice("reduction", "mean")
    golden.choice("loss_factor", 1.0)
    critic = golden.denoiser("k_critic", schedule)
    x_t = add_noise(golden["x"], golden["noise"], schedule.coefficients(t))
    x0_critic = critic(x_t, t, golden.conditioning())
    for name in golden.expected("x0_critic"):
        golden.check(name, x0_critic)
    loss = denoising_loss(golden["x"], x0_critic, native_weight(critic.prediction_type, schedule, t))
    loss.backward()
    golden.check("loss", loss)
    golden.check("grad_k_critic", critic.network.k.grad)


def gan_edm(golden: GoldenFile) -> None:
    schedule = golden.edm_schedule()
    golden.choice("gan_feature", "x0_critic")
    golden.choice("gan_head", "conv1x1_mean_hw")
    golden.choice("gan_loss", "non_saturating_softplus")
    golden.choice("guidance_form", "none")
    golden.choice("loss_factor", 1.0)
    golden.choice("reduction", "mean")
    critic = golden.denoiser("k_critic", schedule)
    weight = golden["head_weight"].clone().requires_grad_()

    def logits(x: Tensor, use: str, label: str) -> Tensor:
        t = golden.edm_time(golden[f"index_{use}"])
        x_t = add_noise(x, golden[f"noise_{use}"], schedule.coefficients(t))
        features = critic(x_t, t, golden.conditioning(f"cond_{label}"))
        return F.conv2d(features, weight, golden["head_bias"]).mean((1, 2, 3))

    fake = golden["x_fake"].clone().requires_grad_()
    loss = generator_loss(logits(fake, "gen", "fake"))
    golden.check("loss_generator", loss)
    golden.check("grad_x_fake", torch.autograd.grad(loss, fake)[0])

    loss = discriminator_loss(logits(golden["x_real"], "real", "real"), logits(fake.detach(), "fake", "fake"))
    golden.check("loss_discriminator", loss)
    golden.check("grad_head_weight", torch.autograd.grad(loss, weight)[0])


def backward_simulation(golden: GoldenFile) -> None:
    golden.choice("first_input", "pure_noise")
    golden.choice("final_noise", "independent")
    golden.choice("guidance_form", "none")
    renoise = {"sde": "fresh"}[golden.choice("renoise", "sde")]
    timesteps = golden["student_timesteps"]
    schedule = golden.table_schedule(timesteps, golden["alphas_cumprod"])
    sampler = Sampler(schedule, tuple(schedule.time(timesteps).tolist()), renoise)
    student = golden.denoiser("k_student", schedule)
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
    golden.choice("loss_factor", 0.5)
    golden.choice("normalizer", "mean_abs_x_minus_x0_teacher")
    golden.choice("normalizer_clip", "lower_bound")
    golden.choice("reduction", "mean")
    loss, gradient = distribution_matching(
        golden["x"], golden["x0_teacher"], golden["x0_critic"], golden["clip"].item()
    )
    golden.check("loss", loss)
    golden.check("grad_x", gradient)

    golden.choice("guidance_form", "u+w*(c-u)")
    golden.choice("rescale_layer_norm_axis", "last_dim")
    golden.choice("rescale_scalar_axis", "whole_tensor")
    guided = guide(golden["cond_pred"], golden["uncond_pred"], golden["scale"])
    golden.check("cfg_none", guided)
    golden.check("cfg_layer_norm", rescale_last_axis(guided, golden["cond_pred"]))
    golden.check("cfg_scalar", rescale_norm(guided, golden["cond_pred"]))


CASES = {
    "dmd2_generator_edm": generator_edm,
    "dmd2_generator_vp": generator_vp,
    "dmd2_critic_edm": critic_edm,
    "dmd2_critic_vp": critic_vp,
    "dmd2_gan_edm": gan_edm,
    "dmd2_backward_simulation": backward_simulation,
    "dmd_loss_and_cfg_rescale": loss_and_rescaled_guidance,
}
