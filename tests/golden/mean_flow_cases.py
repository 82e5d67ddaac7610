"""The MeanFlow family's golden files, compared with the trainer's own class and the functions it is made of."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import inf

import torch
from golden_file import GoldenFile
from torch import Tensor, nn
from toy_network import ToyNetwork, ToyRecipe, toy_conditioning

from fewstep.conditioning.ragged import AnyConditioning, in_groups
from fewstep.data.batch import Batch, Real
from fewstep.diffusion.prediction import add_noise, expand
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import FlowSchedule
from fewstep.losses.mean_flow import mean_flow_target, weighted_loss
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.networks.finite_difference import FiniteDifference
from fewstep.networks.flow_map import FlowMapDenoiser, gap
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.roles import NetworkRole
from fewstep.networks.self_guidance import SelfGuidance
from fewstep.trainers.mean_flow import Flow, MeanFlow, MeanFlowConfig

SCHEDULE = FlowSchedule(timestep_scale=1.0)
WEIGHTINGS = {
    "s/(s+c)^p": "sum",
    "s^2/(s^2+c)^p": "sum_squared",
    "m/(m+c)^p": "mean",
    "m/(m+c)^(1-gamma)": "mean",
    "(norm+c)^-p": "norm",
}
DERIVATIVES = {
    "exact": "exact",
    "finite_difference_central": "central",
    "finite_difference_renoise": "renoise",
    "backward_difference": "backward",
}
#: What w in a guidance of the teacher is in ours, neg + w (pos - neg).
OF_TEACHER: dict[str, Callable[[float], float]] = {
    "none": lambda w: 1.0,
    "u+w*(c-u)": lambda w: w,
    "c+w*(c-u)": lambda w: 1 + w,
}
#: (omega, kappa) of omega v + kappa c + (1 - omega - kappa) u, which every guidance by the student itself is.
OF_STUDENT: dict[str, Callable[[float, float], tuple[float, float]]] = {
    "w*v+kappa*c+(1-w-kappa)*u": lambda w, kappa: (w, kappa),
    "u+w*(v-u)": lambda w, _: (w, 0.0),
    "v+w*(c-u)": lambda w, _: (1.0, w),
    "v+(1-1/w)*(c-u)": lambda w, _: (1.0, 1 - 1 / w),
    "u+w*(c-u)": lambda w, _: (0.0, w),
    "c+w*(c-u)": lambda w, _: (0.0, 1 + w),
}


class TwoTimes(ToyNetwork):
    """A toy network that is told the gap between its times."""

    gap: Tensor

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return super().forward(x, t, cond, t - self.gap)


class Telling(nn.Module):
    """Tells it."""

    def end(self, _time: object, following: object) -> object:
        return following

    @contextmanager
    def on(self, network: TwoTimes, gap: Callable[[], Tensor]) -> Iterator[None]:
        network.gap = gap()
        yield


class AtAllTimes(FlowMapDenoiser):
    """Asked at times below r too, as differences of the definition are; ours refuses them."""

    def raw(self, x_t: Tensor, t: Tensor, conditioning: AnyConditioning, end: Tensor | None = None) -> Tensor:
        return in_groups(self._between, x_t, t, conditioning, end)


class Given:
    """The draws of a file; those of times are normal or uniform ones."""

    def __init__(self, noise: Tensor, times: dict[str, Tensor], coins: dict[str, list[bool]]) -> None:
        self.noise, self.times, self.flags = noise, times, coins

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.noise if name == "noise" else self.times[name]

    def uniform(self, name: str) -> Tensor:
        return self.times[name]

    def coins(self, name: str, probability: float) -> list[bool]:
        return self.flags[name]


def student(golden: GoldenFile, coefficients: str = "k_student") -> FlowMapDenoiser:
    """A toy student of two times."""
    golden.choice("prediction_type", "velocity")
    golden.choice("schedule", "rf")
    golden.choice("toy_time", "t")
    base = NetworkDenoiser(TwoTimes(golden[coefficients]), ToyRecipe(1.0), SCHEDULE, "flow")
    return AtAllTimes(base, Telling())


def teacher(golden: GoldenFile) -> NetworkDenoiser:
    """The toy teacher, which a file of a flow from data lacks."""
    k = golden["k_teacher"] if "in.k_teacher" in golden.tensors else torch.zeros(8, dtype=torch.float64)
    return NetworkDenoiser(ToyNetwork(k), ToyRecipe(1.0), SCHEDULE, "flow")


def number(golden: GoldenFile, *names: str) -> float:
    """A number that is an option or a tensor, under the first of these names that there is."""
    for name in names:
        if golden.states(name):
            return golden.number(name)
        if f"in.{name}" in golden.tensors:
            return golden[name].item()
    raise AssertionError(f"{golden.name}: none of {', '.join(names)} is given")


def weighting(golden: GoldenFile) -> dict:
    """The settings of a file's weight."""
    golden.choice("reduction", "mean")
    golden.choice("target_detached", True)
    derivative: dict = {"derivative": DERIVATIVES[golden.choice("derivative", *DERIVATIVES)]}
    if derivative["derivative"] != "exact":
        derivative["derivative_step"] = number(golden, "derivative_step")
    if golden.choice("weighting", "adaptive", "uniform") == "uniform":
        return {"weighting": "uniform", **derivative}
    form = golden.choice("weight_form", *WEIGHTINGS)
    power = 1 - number(golden, "gamma") if "gamma" in form else number(golden, "adaptive_p", "norm_p", "p")
    constant = number(golden, "weight_eps", "norm_eps", "norm_const", "c_const")
    return {"weighting": WEIGHTINGS[form], "weight_power": power, "weight_constant": constant, **derivative}


def trainer(golden: GoldenFile, **settings) -> MeanFlow:
    """The trainer's own class on toy networks."""
    config = MeanFlowConfig(teacher="toy", out="out", data="toy", time_min=1e-9, **settings, **weighting(golden))
    config = config.resolved()
    denoiser = student(golden)
    roles = {"student": NetworkRole("student", denoiser), "teacher": NetworkRole("teacher", teacher(golden))}
    forms = OF_TEACHER if config.velocity == "teacher" else {"none": None, **OF_STUDENT}
    form = golden.choice("guidance_form", *forms)
    scale = 0.0 if form == "none" else number(golden, "omega", "guidance_scale", "w")
    of_teacher = OF_TEACHER[form](scale) if config.velocity == "teacher" else 1.0
    guided = GuidedDenoiser(roles["teacher"], of_teacher)
    method = MeanFlow(config, roles, guided, Sampler(SCHEDULE, (1.0,), "ode"))
    if config.velocity == "data" and form != "none":
        kappa = number(golden, "kappa") if "kappa" in form else 0.0
        interval = config.guidance_t_min, config.guidance_t_max
        method.guide = SelfGuidance(denoiser, *OF_STUDENT[form](scale, kappa), *interval)
    if method.difference is not None:  # the definition, at all times
        method.difference = replace(method.difference, guarded=False)
    return method


def change_along(
    student: FlowMapDenoiser, difference: FiniteDifference | None, flow: Flow, direction: Tensor | None = None
) -> Tensor:
    """How the student's average velocity changes along the flow, in the way of the file."""
    at, along = (flow.x_t, flow.t, flow.conditioning, flow.r), flow.velocity if direction is None else direction
    if difference is None:
        return student.velocity_and_derivative(*at, along)[1]
    along = flow.line if difference.kind == "renoise" else along
    return difference(student.velocity, SCHEDULE, *at, along, student.velocity(*at).detach())


def conditions(golden: GoldenFile, like: str = "x") -> Tensor:
    return golden["cond"] if "in.cond" in golden.tensors else torch.zeros(len(golden[like]), dtype=torch.float64)


def losses(method: MeanFlow, flow: Flow, target: Tensor) -> tuple[Tensor, Tensor]:
    """The student's average velocity and the loss of each sample."""
    u = method.student.velocity(flow.x_t, flow.t, flow.conditioning, flow.r)
    return u, method.loss(u, target)


def check_gradient(golden: GoldenFile, loss: Tensor, denoiser: NetworkDenoiser) -> None:
    loss.backward()
    golden.check("grad_k_student", denoiser.network.k.grad)


# --- ports A and B: everything from the draws -------------------------------------------------------------------------


def port_a(golden: GoldenFile) -> None:
    if golden.choice("time_sampler", "logit_normal", "uniform") == "uniform":
        settings: dict = {"times": "uniform"}
    else:
        settings = {"time_mean": golden.number("p_mean"), "time_std": golden.number("p_std")}
    settings |= {f"guidance_{n}": number(golden, n) for n in ("t_min", "t_max") if f"in.{n}" in golden.tensors}
    method = trainer(golden, **settings)
    coins = {"apart": (golden["r_equals_t"] == 0).tolist()}
    if "in.label_dropped" in golden.tensors:
        coins["label_drop"] = (golden["label_dropped"] == 1).tolist()
    drawn = "uniforms" if "in.uniforms" in golden.tensors else "normals"
    times = dict(zip("tr", golden[drawn].unbind(1), strict=True))
    flow, target = played(golden, method, Given(golden["noise"], times, coins))
    golden.check("t", flow.t)
    golden.check("r", flow.r)
    u, each = losses(method, flow, target)
    golden.check("loss_per_sample", each)
    golden.check("loss_mean", each.mean())
    golden.check("mse", (u - target).square().mean())
    check_gradient(golden, each.mean(), method.student)


def port_b(golden: GoldenFile) -> None:
    share = number(golden, "r_equals_t_fraction")
    settings = dict(zip(("time_mean", "time_std"), golden["P_t"].tolist(), strict=True))
    if golden.choice("time_sampler", "v0", "v1") == "v1":
        settings |= dict(zip(("r_mean", "r_std"), golden["P_r"].tolist(), strict=True))
    else:
        torch.testing.assert_close(golden["P_r"], golden["P_t"])
    method = trainer(golden, apart=1 - share, **settings)
    normals = {"t": golden["normal_t"], "r": golden["normal_r"]}
    flow, target = played(
        golden, method, Given(golden["noise"], normals, {"apart": (golden["uniform"] >= share).tolist()})
    )
    golden.check("t", flow.t)
    golden.check("r", flow.r)
    loss = losses(method, flow, target)[1].mean()
    golden.check("loss", loss)
    check_gradient(golden, loss, method.student)


def played(golden: GoldenFile, method: MeanFlow, draws: Given) -> tuple[Flow, Tensor]:
    """A step of the trainer up to its target."""
    x, conditioning = golden["x"], toy_conditioning(conditions(golden))
    batch = Batch(len(x), tuple(x.shape[1:]), conditioning, draws, Real(x, conditioning), logging=False)
    apart = [row for row, coin in enumerate(draws.flags["apart"]) if coin]
    flow = method.flow(batch, apart)
    target = flow.velocity.clone()
    if apart:
        target[apart] = method.interval(0, flow.select(apart)).target
    return flow, target


# --- FastGen: at given times ------------------------------------------------------------------------------------------


def fastgen(golden: GoldenFile) -> None:
    source = golden.choice("velocity_source", "teacher", "data")
    warmup = golden.number("tangent_warmup")
    method = trainer(golden, velocity=source, tangent_warmup=warmup)
    if method.difference is not None:  # one-sided where FastGen's is, whose noisiest time is the longest gap's
        method.difference = replace(method.difference, high=golden.number("gap_max"), guarded=True)
    t, r, x, noise = (golden[name] for name in ("t", "r", "x", "noise"))
    conditioning = toy_conditioning(conditions(golden))
    x_t = add_noise(x, noise, SCHEDULE.coefficients(t))
    with torch.no_grad():
        data = noise - x
        unguided, guided = data, data
        if source == "teacher":
            method.teacher.guidance_scale, scale = 1.0, method.teacher.guidance_scale
            unguided = method.teacher(x_t, t, conditioning)
            method.teacher.guidance_scale = scale
            guided = method.teacher(x_t, t, conditioning)
        elif method.guide is not None:
            guided = method.guide.mix(data, x_t, t, conditioning)
    inside = (t >= golden.number("guidance_t_min")) & (t <= golden.number("guidance_t_max"))
    velocity = torch.where(expand(inside, x).bool(), guided, unguided)
    golden.check("velocity", velocity)
    flow = Flow(x_t, t, r, velocity, noise - x, conditioning)
    change = change_along(method.student, method.difference, flow)
    golden.check("jvp", change)
    share = min(1.0, golden["iteration"].item() / warmup) if warmup else 1.0
    distance = gap(SCHEDULE, t, r).clamp(max=golden.number("gap_max"))
    target = mean_flow_target(velocity, change, distance, share)
    if bool((t - r <= golden.number("gap_max")).all()):  # then the trainer's own target is the same
        torch.testing.assert_close(method.interval(golden["iteration"].item(), flow).target, target, rtol=1e-12, atol=0)
    u = method.student.velocity(x_t, t, conditioning, r)
    kind = golden.choice("loss_type", "l2", "opt_grad")
    assert method.config.weighting in ("uniform", "norm" if kind == "opt_grad" else "sum")
    scale = 1.0
    if not golden.absent("residual_scale"):
        golden.choice("residual_scale", "1/sqrt(dim)")
        scale = u[0].numel() ** -0.5
    config = method.config
    each = weighted_loss(u, target, config.weighting, config.weight_power, config.weight_constant, scale)
    golden.check("loss_per_sample", each)
    golden.check("loss_mean", each.mean())
    error = scale * (target - u).detach().flatten(1)
    size = error.norm(dim=1) if kind == "opt_grad" else error.square().sum(1)
    power = 0.0 if config.weighting == "uniform" else config.weight_power
    golden.check("weight", (size + config.weight_constant) ** -power)
    check_gradient(golden, each.mean(), method.student)


# --- port C: improved MeanFlow with a head of its own for the velocity ------------------------------------------------


def port_c(golden: GoldenFile) -> None:
    golden.choice("mode", "meanflow", "i_meanflow")
    golden.choice("v_mse", "u+(t-r)*d-v_hat")
    golden.choice("guidance_form", "v+(1-1/w)*(c-u)")
    golden.choice("toy_condition", "cond+factor*(1-1/w)")
    settings = weighting(golden)
    how = settings["weighting"], settings.get("weight_power", 1.0), settings.get("weight_constant", 0.0)
    kind, difference = settings["derivative"], None
    if kind != "exact":
        difference = FiniteDifference(kind, settings["derivative_step"], inf, guarded=False)
    factor = golden.number("toy_condition_factor")
    u_head, v_head = (
        student(golden, "k_u"),
        NetworkDenoiser(ToyNetwork(golden["k_v"]), ToyRecipe(1.0), SCHEDULE, "flow"),
    )
    dropped = golden["label_dropped"] == 1
    w = torch.where(dropped, 1.0, golden["w"])
    told = toy_conditioning(torch.where(dropped, 0.0, golden["cond"]) + factor * (1 - 1 / w))
    t, r, x, noise = (golden[name] for name in ("t", "r", "x", "noise"))
    x_t = add_noise(x, noise, SCHEDULE.coefficients(t))
    own = v_head.raw(x_t, t, told)
    with torch.no_grad():
        null = v_head.raw(x_t, t, toy_conditioning(torch.zeros_like(w)))
    guided = noise - x + (1 - 1 / w)[:, None, None, None] * (own.detach() - null)
    change = change_along(u_head, difference, Flow(x_t, t, r, guided, noise - x, told), own.detach())
    target = mean_flow_target(guided, change, gap(SCHEDULE, t, r))
    u = u_head.velocity(x_t, t, told, r)
    flow_matching = weighted_loss(own, guided, *how).mean()
    mean_flow = weighted_loss(u, target, *how).mean()
    golden.check("fm_loss", flow_matching)
    golden.check("mf_loss", mean_flow)
    golden.check("v_mse", (u - target).square().mean())
    golden.check("loss", flow_matching + mean_flow)
    (flow_matching + mean_flow).backward()
    golden.check("grad_k_u", u_head.network.k.grad)
    golden.check("grad_k_v", v_head.network.k.grad)


CASES = {
    "meanflow_port_a": port_a,
    "meanflow_port_b": port_b,
    "meanflow_port_c": port_c,
    "meanflow_fastgen_loss": fastgen,
}
