"""Golden files of continuous-time and truncated consistency, compared with what the trainer is made of."""

import torch
from diffusers import SCMScheduler
from golden_file import GoldenFile
from torch import Tensor
from toy_network import toy_denoiser

from fewstep.conditioning.conditioning import Conditioning
from fewstep.diffusion.discretization import TimePair, ect_mapping
from fewstep.diffusion.prediction import add_noise
from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, NoiseSchedule, TrigFlowSchedule
from fewstep.diffusion.trig_flow import TrigFlow
from fewstep.losses.consistency import DISTANCES, WEIGHTINGS
from fewstep.losses.score import denoising_loss, distribution_matching
from fewstep.losses.trig_flow import by_log_variance, normalized, tangent, tangent_loss
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.roles import NetworkRole
from fewstep.networks.trig_flow import Point, TrigFlowNetwork
from fewstep.trainers.continuous_consistency import ContinuousConsistency, ContinuousConsistencyConfig

NORMALIZATIONS = {"none": "none", "norm": "norm", "norm/sqrt(dim)": "norm/sqrt(dim)"}
DERIVATIVES = {
    "exact": "exact",
    "semi_continuous": "semi_continuous",
    "discrete": "discrete",
    "backward_difference": "backward",
    "finite_difference_central": "central",
    "finite_difference_renoise": "renoise",
}


def schedule_of(golden: GoldenFile) -> NoiseSchedule:
    """Of the network: EDM, flow matching or a table."""
    kind = golden.choice("schedule", "edm", "rf")
    if kind == "rf":
        return FlowSchedule(timestep_scale=1.0)
    given = golden.number("sigma_data") if golden.states("sigma_data") else golden["sigma_data"].item()
    return EDMSchedule(sigma_data=given)


def network(golden: GoldenFile, coefficients: str, schedule: NoiseSchedule) -> NetworkDenoiser:
    """A toy network in its own schedule; the flow time of an angle is sin / (sin + cos)."""
    if not isinstance(schedule, FlowSchedule):
        return golden.denoiser(coefficients, schedule)
    kinds = {"velocity": "flow", "epsilon": "epsilon"}
    said = golden.choice("prediction_type", *kinds)
    golden.choice("toy_time", "t", "sin(t)/(sin(t)+cos(t))")
    return toy_denoiser(golden[coefficients], schedule, kinds[said], 1.0)


def guided(golden: GoldenFile, denoiser: NetworkDenoiser, scale: str, on: bool = True) -> GuidedDenoiser:
    """A network under the file's guidance, in its own output."""
    more = {"none": None, "u+w*(c-u)": 0.0, "c+w*(c-u)": 1.0}
    form = more[golden.choice("guidance_form", *more)]
    return GuidedDenoiser(denoiser, 1.0 if form is None or not on else golden[scale].item() + form)


def derivative_of(golden: GoldenFile, denoiser: NetworkDenoiser, trig: TrigFlow) -> TrigFlowNetwork:
    """The student as TrigFlow's F, with the file's derivative."""
    kind = DERIVATIVES[golden.choice("derivative", *DERIVATIVES)]
    step = {} if golden.absent("derivative_step") else {"step": golden.number("derivative_step")}
    return TrigFlowNetwork(denoiser, trig, kind, **step)


def share_of(warmup: float, iteration: Tensor) -> float:
    """How much of a tangent that is warmed up counts."""
    return min(1.0, iteration.item() / warmup) if warmup else 1.0


def scm_loss(golden: GoldenFile) -> None:
    golden.choice("wrapper", "trigflow")
    golden.choice("target_detached", True)
    golden.choice("distance", "mse")
    golden.choice("reduction", "mean")
    schedule = schedule_of(golden)
    trig = TrigFlow(schedule, golden["sigma_data"].item())
    native, x, noise, conditioning = golden["t_native"], golden["x"], golden["noise"], golden.conditioning()
    t = schedule.time_from_sigma(native) if isinstance(schedule, EDMSchedule) else native
    angle = trig.angle(t)
    golden.check("t_trig", angle)
    x_t = add_noise(x, noise, schedule.coefficients(t))
    of_data = trig.sigma_data * trig.output(noise - x, "flow", x_t, t)
    direction = of_data
    if golden.choice("objective", "training", "distillation") == "distillation":
        teacher = TrigFlowNetwork(network(golden, "k_teacher", schedule), trig)
        direction = trig.sigma_data * guided(golden, teacher, "guidance_scale")(x_t, t, conditioning).detach()
    else:
        golden.choice("guidance_form", "none")
    golden.check("dxdt", direction)

    student = derivative_of(golden, network(golden, "k_student", schedule), trig)
    output = student(x_t, t, conditioning)
    golden.check("F_student", output)
    # FastGen's difference follows the sample's own noise, whatever the teacher says.
    way = of_data if student.kind == "renoise" else direction
    change = student.derivative(Point(x_t, t, conditioning, way), output)
    golden.check("jvp", change)

    share = share_of(golden.number("tangent_warmup"), golden["iteration"])
    g = tangent("scm", output, change, trig.sample(x_t, t), direction, angle, share, trig.sigma_data)
    g = normalized(g, golden.choice("tangent_normalization", *NORMALIZATIONS), golden.number("tangent_norm_eps"))
    apart = tangent_loss(output, g)
    golden.check("loss_unweighted", apart)
    sigma = schedule.coefficients(t).sigma
    weights = {"1/sigma": 1 / sigma, "1/sigma^2": sigma**-2, "uniform": torch.ones_like(sigma)}
    loss = weights[golden.choice("weighting", *weights)] * apart
    if golden.choice("divide_by_dim", True, False):
        loss = loss / x[0].numel()
    if not golden.absent("log_variance"):
        golden.choice("log_variance", "a0+a1*t_native")
        constant, slope = golden["logvar_coef"]
        loss = by_log_variance(loss, constant + slope * native)
    golden.check("loss_per_sample", loss)
    golden.check("loss_mean", loss.mean())
    loss.mean().backward()
    golden.check("grad_k_student", student.denoiser.network.k.grad)


def rcm_losses(golden: GoldenFile) -> None:
    golden.choice("wrapper", "trigflow")
    schedule, x, conditioning = schedule_of(golden), golden["x"], golden.conditioning()
    trig = TrigFlow(schedule, golden.number("sigma_data"))
    student = derivative_of(golden, network(golden, "k_student", schedule), trig)
    teacher, critic = (network(golden, f"k_{name}", schedule) for name in ("teacher", "critic"))
    on = golden.choice("guide_teacher", True, False)

    # The consistency of the student along the guided teacher's trajectories.
    angle = golden["t_G"]
    t = trig.time(angle)
    x_t = add_noise(x, golden["noise_scm"], schedule.coefficients(t))
    direction = trig.sigma_data * guided(golden, TrigFlowNetwork(teacher, trig), "guidance", on)(x_t, t, conditioning)
    output = student(x_t, t, conditioning)
    change = student.derivative(Point(x_t, t, conditioning, direction.detach()), output)
    share = share_of(golden["warmup"].item(), golden["iteration"])
    warm = golden.choice("warmup_scales_derivative", True, False)
    g = tangent("rcm", output, change, trig.sample(x_t, t), direction.detach(), angle, share, trig.sigma_data, warm)
    g = normalized(g, golden.choice("tangent_normalization", *NORMALIZATIONS), golden.number("tangent_norm_eps"))
    apart = golden.number("scm_loss_scale") * tangent_loss(output, g)
    reduced(golden, "scm", apart, x, student.denoiser)

    # Distribution matching of samples that are noised anew on their way.
    x0, here = rolled_out(golden, student.denoiser, "dmd_noises", trig)
    golden.check("x0_rollout", x0)
    asked = guided(golden, critic, "guidance", golden.choice("guide_critic", True, False))
    with torch.no_grad():
        x0_teacher, x0_critic = (who(*here, conditioning) for who in (guided(golden, teacher, "guidance", on), asked))
    golden.choice("normalizer", "mean_abs_y_minus_x0_teacher")
    least = 0.0 if golden.absent("normalizer_min") else golden.number("normalizer_min")
    gradient = distribution_matching(x0.detach(), x0_teacher, x0_critic, least).gradient
    # Of half the mean square over the batch; the file's loss has a factor of its own.
    apart = golden.number("dmd_loss_factor") * (gradient * x.numel()).square().flatten(1).mean(1)
    reduced(golden, "dmd", apart, x, student.denoiser, (x0, 2 * golden.number("dmd_loss_factor") * gradient))

    # The critic denoises such samples.
    x0, (x_t, t) = rolled_out(golden, student.denoiser, "critic_noises", trig)
    said = critic(x_t, t, conditioning)
    sin = trig.angle(t).sin()
    weights = {"1/sin(t)^2": sin**-2, "uniform": torch.ones_like(sin)}
    weight = weights[golden.choice("critic_weighting", *weights)]
    apart = torch.stack([denoising_loss(x0[i : i + 1], said[i : i + 1], weight[i : i + 1]) for i in range(len(x))])
    reduced(golden, "critic", apart, x, critic)


def rolled_out(
    golden: GoldenFile, student: NetworkDenoiser, noises: str, trig: TrigFlow
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The student's sample, and where it is noised to be looked at: x_t and t."""
    golden.choice("rollout_gradient", "last_step")
    grid = tuple(trig.time(golden["sim_times"]).tolist())
    first, *steps, last = golden[noises]
    x0 = rollout(student, Sampler(trig.schedule, grid, "fresh"), first, golden.conditioning(), lambda k: steps[k - 1])
    t = trig.time(golden["t_D"])
    return x0, (add_noise(x0.detach(), last, trig.schedule.coefficients(t)), t)


def reduced(
    golden: GoldenFile,
    name: str,
    apart: Tensor,
    x: Tensor,
    denoiser: NetworkDenoiser,
    through: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Check a loss, given as means over samples (B,), and the gradient of its mean over the batch.

    ``through``: a tensor and that mean's gradient there, where the loss has no graph of its own.
    """
    size = x[0].numel()
    factors = {"sum_per_sample": size, "sum_over_batch_size": size, "half_sum_over_batch_size": size / 2, "mean": 1.0}
    kind = golden.choice(f"{name}_reduction", *factors)
    loss = factors[kind] * apart
    golden.check(f"loss_{name}", loss if kind == "sum_per_sample" else loss.mean())
    value, gradient = (loss.mean(), None) if through is None else (through[0], factors[kind] * through[1])
    (k,) = torch.autograd.grad(value, denoiser.network.k, gradient)
    (found,) = golden.expected(f"grad_{name}_k.*")
    golden.check(found, k)


def tcm_loss(golden: GoldenFile) -> None:
    golden.choice("target_detached", True)
    golden.choice("guidance_form", "none")
    schedule, x, offset = schedule_of(golden), golden["x"], golden.number("boundary_offset")
    transition, boundary = golden["transition_t"].item(), golden["boundary_index"].tolist()
    config = ContinuousConsistencyConfig(
        teacher="toy",
        out="out",
        data="toy",
        init="toy",
        variant="tcm",
        transition=transition,
        boundary_share=len(boundary) / len(x),
        boundary_weight=golden.number("boundary_weight"),
        distance=golden.choice("distance", *DISTANCES),
        weighting=golden.choice("weighting", *WEIGHTINGS),
        huber_c=golden["huber_c"].item() if "in.huber_c" in golden.tensors else 0.0,
    )
    student, first = (network(golden, name, schedule) for name in ("k_student", "k_stage1"))
    roles = {"student": NetworkRole("student", student), "target": NetworkRole("target", first)}
    method = ContinuousConsistency(config, roles, None, Sampler(schedule, (1.0,), "fresh"))

    t = golden["t"].index_fill(0, golden["boundary_index"], transition + offset)
    k = golden.number("mapping_k") if golden.states("mapping_k") else 0.0
    k = k if golden.choice("mapping", "sigmoid", "const") == "sigmoid" else 0.0
    r = ect_mapping(t, 1 - golden["ratio"].item(), k, golden.number("mapping_b")).clamp(min=golden.number("min_r"))
    # The source's times are the schedule's own, which for EDM are noise levels.
    own = schedule.time_from_sigma if isinstance(schedule, EDMSchedule) else torch.Tensor.double
    below = [row for row, level in enumerate(r.tolist()) if level < transition]
    each = method.compare(x, golden["noise"], TimePair(own(t), own(r), t, r), below, golden.conditioning())
    at = torch.tensor([row in boundary for row in range(len(x))])
    golden.check("cm_loss", each[~at].mean())
    golden.check("loss_boundary", each[at].mean())
    loss = (torch.tensor(method.shares(len(x), boundary)).double() * each).mean()
    golden.check("loss", loss)
    loss.backward()
    golden.check("grad_k_student", student.network.k.grad)
    assert first.network.k.grad is None


def scm_sampler(golden: GoldenFile) -> None:
    golden.choice("guidance_form", "none")
    golden.choice("model_output", "sigma_data*raw(x/sigma_data)")
    golden.choice("prediction_type", "trigflow")
    golden.choice("schedule", "trigflow")
    golden.choice("toy_time", "t")
    stock = SCMScheduler(sigma_data=golden.number("sigma_data"))
    highest, *between, _ = golden["timesteps"].tolist()
    middle = between[0] if len(between) == 1 else None
    stock.set_timesteps(len(between) + 1, max_timesteps=highest, intermediate_timesteps=middle)
    torch.testing.assert_close(stock.timesteps.double(), golden["timesteps"])
    # Data and noise of one standard deviation: at unit scale it is an ordinary network of TrigFlow's own schedule.
    schedule, scale, inputs, outputs = TrigFlowSchedule(), golden.number("sigma_data"), [], []
    network = toy_denoiser(golden["k"], schedule, "v_prediction", 1.0)

    def watched(x_t: Tensor, t: Tensor, conditioning: Conditioning, end: Tensor | None = None) -> Tensor:
        inputs.append(scale * x_t)
        outputs.append(network(x_t, t, conditioning))
        return outputs[-1]

    sampler = Sampler(schedule, tuple(schedule.time(golden["timesteps"][:-1]).tolist()), "fresh")
    x0 = rollout(watched, sampler, golden["x_init"] / scale, golden.conditioning(), lambda k: golden["noises"][k - 1])
    golden.check("trajectory", torch.stack([*inputs, scale * x0]))
    golden.check("denoised", scale * torch.stack(outputs))


CASES = {
    "scm_fastgen_loss": scm_loss,
    "scm_sampler": scm_sampler,
    "rcm_losses": rcm_losses,
    "tcm_loss": tcm_loss,
}
