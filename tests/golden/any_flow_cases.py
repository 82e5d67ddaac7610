"""AnyFlow's golden files, compared with the trainer's own class and the functions it is made of."""

from dataclasses import replace

import torch
from golden_file import GoldenFile
from mean_flow_cases import SCHEDULE, Telling, TwoTimes, check_gradient, conditions, number, teacher
from torch import Tensor
from toy_network import ToyRecipe, toy_conditioning
from vocabulary import guided

from fewstep.conditioning.ragged import AnyConditioning, in_groups
from fewstep.data.batch import Batch, Real
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.placed_times import spread_places, time_table
from fewstep.diffusion.renoising import Renoised, Renoiser
from fewstep.diffusion.rollout import Sampler, rollout, shortcut
from fewstep.diffusion.timesteps import even_grid
from fewstep.losses.flow_map import rebalanced, time_weight
from fewstep.losses.score import denoising_loss, distribution_matching, native_weight, score_distillation
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.networks.finite_difference import FiniteDifference
from fewstep.networks.flow_map import FlowMapDenoiser
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.roles import NetworkRole
from fewstep.trainers.any_flow import AnyFlow, AnyFlowConfig, Points

WEIGHTS = {"t*sqrt(1-t)": "beta08", "exp(-2*(t-1/2)^2)": "gaussian", "uniform": "uniform"}
DIFFERENCES = {
    "finite_difference_central": "central",
    "backward_difference": "backward",
    "finite_difference_renoise": "renoise",
}
FUSED = "(c+(w-1)*u)/w"
#: w in u + w (c - u), of the number that a file calls its guidance scale.
GUIDED = {"u+w*(c-u)": 0.0, "c+w*(c-u)": 1.0}


class Unguarded(FlowMapDenoiser):
    """The authors' differences also ask beyond the interval."""

    def raw(self, x_t: Tensor, t: Tensor, conditioning: AnyConditioning, end: Tensor | None = None) -> Tensor:
        return in_groups(self._between, x_t, t, conditioning, end)


class Given:
    """The draws of a file."""

    def __init__(self, draws: dict[str, Tensor], indices: list[int] | None = None) -> None:
        self.draws, self.indices = draws, indices or []

    def uniform(self, name: str) -> Tensor:
        return self.draws[name]

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.draws[name]

    def coins(self, name: str, probability: float) -> list[bool]:
        return [False] * len(self.indices)


def student(golden: GoldenFile) -> Unguarded:
    """A toy student of two times."""
    golden.choice("prediction_type", "velocity")
    golden.choice("schedule", "rf")
    golden.choice("toy_time", "t")
    return Unguarded(NetworkDenoiser(TwoTimes(golden["k_student"]), ToyRecipe(1.0), SCHEDULE, "flow"), Telling())


# --- stage 1 ----------------------------------------------------------------------------------------------------------


def map_loss(golden: GoldenFile) -> None:
    golden.choice("target_detached", True)
    golden.choice("distance", "mse")
    golden.choice("time_sampler", "max_min_of_two_uniforms")
    x, shift = golden["x"], golden["shift"].item()
    method, divisor = trainer(golden, shift)
    points = method.points(given(golden, method))
    golden.check("t", points.t)
    golden.check("r", points.r)

    u = method.student.velocity(points.x_t, points.t, points.conditioning, points.r)
    u, target, change = method.guided(points, u, derivative(golden, method, points, u) * divisor)
    golden.check("derivative", change)
    golden.check("weight", method.weight.at(points.t))
    each = method.errors(points, u, target)
    golden.check("loss_per_sample", each)
    eps = golden.number("rebalance_eps") if golden.states("rebalance_eps") else 0.0
    if not golden.absent("rebalance"):
        golden.choice("rebalance", "mean_of_r_equals_t/own")
        apart = torch.zeros(len(x), dtype=torch.bool)
        apart[points.parts.apart] = True
        each = rebalanced(each, apart, each[~apart].mean(), eps)
    loss = golden.over_mean(x) * each.mean()
    golden.check("loss", loss)
    check_gradient(golden, loss, method.student)


def trainer(golden: GoldenFile, shift: float) -> tuple[AnyFlow, float]:
    """The trainer's own class on toy networks, and what a derivative is multiplied by that no scale divides."""
    source = golden.choice("velocity_source", "data", "teacher")
    form, divisor = golden.choice("guidance_form", "none", *([FUSED] if source == "data" else GUIDED)), 1.0
    scale = 1.0 if form == "none" else golden["guidance_scale"].item() + GUIDED.get(form, 0.0)
    if not golden.choice("derivative_divided_by_guidance_scale", True, False) and form == FUSED:
        divisor = scale  # the trainer's own class divides
    config = AnyFlowConfig(
        teacher="toy",
        out="out",
        data="toy",
        stage="map",
        velocity=source,
        map_guidance=scale,
        label_drop=0.0,
        time_min=1e-9,
        weighting=WEIGHTS[golden.choice("weighting", *WEIGHTS)],
        weight_power=0.0,  # the golden form has no adaptive weight
        equal_share=number(golden, "r_equals_t_fraction"),
        zero_share=number(golden, "r_zero_fraction"),
    )
    roles = {"student": NetworkRole("student", student(golden)), "teacher": NetworkRole("teacher", teacher(golden))}
    sampler = Sampler(SCHEDULE, (1.0,), "ode")
    method = AnyFlow(config, roles, GuidedDenoiser(roles["teacher"], 1.0), sampler, shift=shift)
    method.weight = time_weight(config.weighting, time_table(golden.number("weight_grid"), shift))
    return method, divisor


def given(golden: GoldenFile, method: AnyFlow) -> Batch:
    """The file's batch, whose samples lie in the order of their places."""
    x, conditioning = golden["x"], toy_conditioning(conditions(golden))
    places = spread_places(len(x))
    first, second = golden["uniforms"].unbind(1)
    draws = Given({"t": first, "r": second, "map_noise": golden["noise"]}, [places.index(k) for k in range(len(x))])
    return Batch(len(x), tuple(x.shape[1:]), conditioning, draws, Real(x, conditioning), logging=False)


def derivative(golden: GoldenFile, method: AnyFlow, points: Points, u: Tensor) -> Tensor:
    """Of the whole batch, as in the file; the trainer's own is that where the times differ and nothing is beyond."""
    kind = golden.choice("derivative", *DIFFERENCES, "exact")
    h = golden.number("derivative_step") if golden.states("derivative_step") else 0.0
    at = points.x_t, points.t, points.conditioning, points.r, points.velocity
    if kind == "exact":
        asked = method.student.velocity_and_derivative(*at)[1].detach()
        step = torch.zeros_like(points.t)
    else:
        difference = FiniteDifference(DIFFERENCES[kind], h, guarded=False)
        asked = difference(method.student.velocity, SCHEDULE, *at, u.detach())
        method.difference = replace(difference, guarded=True)
        step = h * (points.t if kind == "finite_difference_renoise" else torch.ones_like(points.t))
    inside = (points.t - points.r > step) & (points.t + step <= 1)
    rows = [row for row in points.parts.apart if inside[row]]
    torch.testing.assert_close(method.change(points, u)[rows], asked[rows], rtol=1e-9, atol=1e-12)
    return asked


# --- stage 2 ----------------------------------------------------------------------------------------------------------


def on_policy(golden: GoldenFile) -> None:
    golden.choice("differentiate_networks", False)
    golden.choice("nan_to_num", True, False)
    golden.choice("solver", "flow_map")
    golden.choice("guidance_form", "none", *GUIDED)
    mapped, conditioning = student(golden), golden.conditioning()
    law = tuple(golden.number(name) for name in ("p_mean", "p_std") if golden.states(name))

    # The student: where three steps of the map lead, and where teacher and critic disagree about that.
    x0 = rolled(golden, mapped, "")
    golden.check("x0", x0)
    here = noised(golden, x0.detach(), "time_sampler", law, "")
    golden.check("t", here.t)
    golden.check("x_t", here.x_t)
    asked = [golden.denoiser(f"k_{name}", SCHEDULE) for name in ("teacher", "critic")]
    for denoiser in asked:
        denoiser.recipe.divisor = 1.0  # flow time itself
    x0_teacher, x0_critic = (
        guided(golden, denoiser, f"guide_{name}")(here.x_t, here.t, conditioning)
        for name, denoiser in zip(("teacher", "critic"), asked, strict=True)
    )
    loss, gradient = matched(golden, x0.detach(), here, x0_teacher, x0_critic)
    factor = golden.loss_factor(x0)
    golden.check("dm_direction", gradient * x0.numel())
    golden.check("loss_student", factor * loss)
    golden.check("grad_x", factor * gradient)
    x0.backward(factor * gradient)
    golden.check("grad_k_student", mapped.network.k.grad)

    # The critic, on a rollout of its own.
    with torch.no_grad():
        x0 = rolled(golden, mapped, "_critic")
    there = noised(golden, x0, "critic_time_sampler", law, "_critic")
    critic = asked[1]
    weights = {"uniform": torch.ones_like(there.t), "sigma_squared": there.t**2, "alpha_squared": (1 - there.t) ** 2}
    weight = weights[golden.choice("critic_weighting", *weights)]
    spaces = {"mse_velocity": "flow", "mse_x0": "sample", "mse_epsilon": "epsilon", "mse_v": "v_prediction"}
    weight = weight * native_weight(spaces[golden.choice("critic_distance", *spaces)], SCHEDULE, there.t)
    loss = golden.over_mean(x0) * denoising_loss(x0, critic(there.x_t, there.t, conditioning), weight)
    golden.check("loss_critic", loss)
    golden.check("grad_k_critic", torch.autograd.grad(loss, critic.network.k)[0])


def rolled(golden: GoldenFile, mapped: FlowMapDenoiser, suffix: str) -> Tensor:
    """Where the file's rollout ends."""
    kinds = {"all_segments": 0, "all_after_detached_first": 1, "last_segment": None}
    follow = kinds[golden.choice("rollout_gradient", *kinds)]
    times = golden.choice("student_time", "two", "one")

    def one_time(x_t: Tensor, t: Tensor, conditioning: AnyConditioning, end: Tensor | None = None) -> Tensor:
        return mapped(x_t, t, conditioning, t)

    asked: Denoiser = mapped if times == "two" else one_time
    count, index = (golden[f"{name}{suffix}"].item() for name in ("num_steps", "index"))
    grid = shortcut(even_grid(count, golden["shift"].item()).tolist(), index)
    noise = golden[f"noise_initial{suffix}"]
    return rollout(asked, Sampler(SCHEDULE, grid, "ode"), noise, golden.conditioning(), gradient_from=follow)


def noised(golden: GoldenFile, x0: Tensor, option: str, law: tuple[float, ...], suffix: str) -> Renoised:
    """A sample at the file's time, by what an option says of it; ``law``: of a logit-normal."""
    is_normal = golden.choice(option, "uniform", "logit_normal") == "logit_normal"
    drawn = golden[f"normal{suffix}" if is_normal else f"uniform{suffix}"]
    renoiser = Renoiser(SCHEDULE, 0.0, 1.0, golden["shift"].item(), normal=law if is_normal else None)
    return renoiser(x0, Given({"x_time": drawn, "x_noise": golden[f"noise{suffix}"]}), "x")


def matched(
    golden: GoldenFile, x0: Tensor, here: Renoised, x0_teacher: Tensor, x0_critic: Tensor
) -> tuple[Tensor, Tensor]:
    """The project's loss and gradient, by the file's normaliser."""
    if golden.absent("normalizer"):
        if golden.states("normalizer_min"):
            golden.number("normalizer_min")  # of nothing
        return score_distillation(x0_teacher, x0_critic, torch.ones_like(here.t))
    kinds = {"x": x0, "y": x0, "x_t": here.x_t}
    names = {f"mean_abs_{kind}_minus_x0_teacher": value for kind, value in kinds.items()}
    compared = names[golden.choice("normalizer", *names)]
    bounds = ("normalizer_min", "normalizer_eps", "normalizer_clamp")
    given = {name: golden.number(name) for name in bounds if not golden.absent(name)}
    least = max(given.get("normalizer_min", 0.0), given.get("normalizer_clamp", 0.0))
    return distribution_matching(
        compared, x0_teacher, x0_critic, least, normalizer_eps=given.get("normalizer_eps", 0.0)
    )


CASES = {"anyflow_map_loss": map_loss, "anyflow_onpolicy_losses": on_policy}
