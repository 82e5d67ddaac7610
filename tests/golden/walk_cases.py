"""Golden files of DMD2's options that change where the student walks: CDM and DP-DMD."""

from types import SimpleNamespace

import torch
from golden_file import GoldenFile
from torch import Tensor, nn
from vocabulary import SPACES, denoising, guided, number

from fewstep.critic.first_step import TeacherStart, walk_apart
from fewstep.critic.off_trajectory import Walked, place
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.prediction import add_noise, ode_step
from fewstep.diffusion.renoising import Renoised
from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.losses.score import distribution_matching, native_weight, score_distillation
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.roles import NetworkRole
from fewstep.training.method import Pull
from fewstep.training.orders import pull

PLACES = {"extrapolated_along_velocity": "extrapolated", "trajectory_point": "point", "renoised": "renoised"}
BASES = ("trajectory_prediction", "final_sample", "student_prediction")
#: What the scale of u + w (c - u) is more than a file's w.
SCALES = {"none": None, "w*(c-u)": 1.0, "u+w*(c-u)": 0.0, "c+w*(c-u)": 1.0}


class Network(nn.Module):
    """What :func:`fewstep.training.orders.pull` moves: a toy network's coefficients."""

    def __init__(self, k: Tensor) -> None:
        super().__init__()
        self.k = nn.Parameter(k.clone())


def column(golden: GoldenFile, name: str) -> Tensor:
    """A time of every sample, (B,)."""
    given = golden[name].double()
    return given.expand(len(golden["cond"])) if given.dim() == 0 else given


def normalized(golden: GoldenFile, option: str, x0: Tensor, x_t: Tensor, teachers: dict[str, Tensor]) -> dict:
    """What the project's matching is told of the file's normaliser: ``compared``, ``reference``, and its bounds."""
    if golden.absent(option):
        for name in ("normalizer_min", "normalizer_eps", "normalizer_clamp"):
            if golden.states(name):
                golden.number(name)  # of nothing
        return {}
    places = {"x": x0, "y": x0, "x_t": x_t}
    pairs = [(place, which) for place in places for which in teachers]
    names = {f"mean_abs_{place}_minus_x0_{which}": (places[place], teachers[which]) for place, which in pairs}
    compared, reference = names[golden.choice(option, *names)]
    ends = {name: 0.0 if golden.absent(name) else golden.number(name) for name in ("normalizer_min", "normalizer_eps")}
    clamp = 0.0 if golden.absent("normalizer_clamp") else golden.number("normalizer_clamp")
    # Ours is max(mean, least) + eps, and CDM's max(mean + eps, clamp).
    least = max(ends["normalizer_min"], clamp - ends["normalizer_eps"])
    return {"compared": compared, "reference": reference, "least": least, "eps": ends["normalizer_eps"]}


def matched(away: Tensor, told: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The project's loss 1/2 mean g^2 and its gradient, of a direction ``away`` (B, ...) before it is normalised."""
    if not told:
        return score_distillation(torch.zeros_like(away), away, torch.ones(len(away), dtype=torch.float64))
    reference = told["reference"]
    return distribution_matching(
        told["compared"], reference, reference + away, told["least"], normalizer_eps=told["eps"]
    )


# --- CDM --------------------------------------------------------------------------------------------------------------


def cdm(golden: GoldenFile) -> None:
    golden.choice("differentiate_networks", False)
    golden.choice("solver", "euler")
    golden.choice("distance", "mse_x0", "mse")
    schedule, told = golden.flow_schedule(), golden.conditioning()
    student, teacher, critic = (golden.denoiser(f"k_{name}", schedule) for name in ("student", "teacher", "critic"))

    # The walk, by the project's own rollout.
    sigmas = golden["sigmas"].tolist()
    grid = tuple(sigmas[:-1] if sigmas[-1] == 0 else sigmas)
    sampler, points = Sampler(schedule, grid, "ode"), {}
    with torch.no_grad():
        end = rollout(student, sampler, golden["noise_initial"], told, on_step=points.__setitem__)
        walk = torch.stack([points[k] for k in range(len(grid))])
        said = torch.stack([student(x, sampler.times(k, x), told) for k, x in enumerate(walk)])
    if sigmas[-1] != 0:  # the last of them is where the walk ends, and not where a step begins
        t = sampler.times(len(grid) - 2, end)
        then = schedule.coefficients(torch.full_like(t, sigmas[-1]))
        end = ode_step(walk[-2], said[-2], schedule.coefficients(t), then)
    golden.check("trajectory_end", end)

    def at(index: Tensor) -> Walked:
        rows = torch.arange(len(index))
        return Walked(walk[index, rows], torch.tensor(grid, dtype=torch.float64)[index], said[index, rows])

    # The student's three terms.
    total, factor = torch.zeros((), dtype=torch.float64), golden.loss_factor(end)
    gradient_of_k = torch.zeros_like(student.network.k)
    for name in ("ca", "dm", "cdm"):
        walked = at(golden[f"index_{name}"])
        if name == "cdm":
            x, t, base = off_trajectory(golden, schedule, walked, end)
        else:
            x, t, base = walked.x_t, walked.t, None
        y = student(x, t, told)
        same = name == "cdm" and golden.choice("off_trajectory_teacher_time", "independent", "student") == "student"
        a = t if same else column(golden, f"sigma_teacher_{name}")
        noise = golden[f"noise_{name}"]
        here = Renoised(add_noise(y.detach() if base is None else base, noise, schedule.coefficients(a)), a, noise)
        loss, gradient = term(golden, name, y.detach(), here, (teacher, critic))
        golden.check(f"loss_{name}", factor * loss)
        weight = golden[f"weight_{name}"].item()
        total = total + weight * factor * loss
        gradient_of_k += torch.autograd.grad(y, student.network.k, weight * factor * gradient)[0]
    golden.check("loss_student", total)
    golden.check("grad_k_student", gradient_of_k)

    # The critic, and its pull.
    walked = at(golden["index_critic"])
    clean = end if golden.choice("critic_x0", *BASES[:2]) == "final_sample" else walked.x0
    a, noise = column(golden, "sigma_critic"), golden["noise_critic"]
    x0 = critic(add_noise(clean, noise, schedule.coefficients(a)), a, told)
    loss = denoising(golden, schedule, a, clean, x0, "critic_")
    golden.check("loss_critic", loss)
    golden.check("grad_k_critic", torch.autograd.grad(loss, critic.network.k)[0])
    roles = {name: bare(name, golden[f"k_{name}"], schedule) for name in ("critic", "student")}
    pull(Pull("critic", "student", golden["merge_decay"].item()), roles, torch.ones((), dtype=torch.float64))
    golden.check("k_critic_merged", roles["critic"].denoiser.network.k)


def bare(name: str, k: Tensor, schedule: NoiseSchedule) -> NetworkRole:
    return NetworkRole(name, NetworkDenoiser(Network(k), SimpleNamespace(unread=None), schedule, "flow"))


def off_trajectory(
    golden: GoldenFile, schedule: NoiseSchedule, walked: Walked, end: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Where the student is asked once more, when, and what is noised for the teacher if not what it says."""
    where = PLACES[golden.choice("off_trajectory", *PLACES)]
    if where == "renoised" or not golden.absent("off_trajectory_base"):
        base = golden.choice("off_trajectory_base", *BASES[:2])
        if base == "final_sample":
            walked = Walked(walked.x_t, walked.t, end) if where == "renoised" else walked
    of_teacher = "student_prediction"
    if not golden.absent("off_trajectory_teacher_base"):
        of_teacher = golden.choice("off_trajectory_teacher_base", *BASES)
    t = walked.t if where == "point" else column(golden, "sigma_student_cdm")
    noise = golden["noise_student_cdm"] if where == "renoised" else None
    others = {"student_prediction": None, "final_sample": end, "trajectory_prediction": walked.x0}
    return place(walked, schedule, where, t, noise), t, others[of_teacher]


@torch.no_grad()
def term(
    golden: GoldenFile, name: str, y: Tensor, here: Renoised, networks: tuple[Denoiser, Denoiser]
) -> tuple[Tensor, Tensor]:
    """The project's loss and gradient at ``y``: what guidance adds (CA), or the match of teacher and critic."""
    teacher, critic = networks
    told = golden.conditioning()
    more = SCALES[golden.choice("guidance_form", *SCALES)]
    on = golden.choice("guide_teacher", True, False) and more is not None
    scale = number(golden, "guidance_scale") + more if on else 1.0
    if name == "ca":
        positive, negative = GuidedDenoiser(teacher, 2.0).pair(here.x_t, here.t, told)
        away = (scale - 1) * (negative - positive)
        teachers = {"teacher_cond": positive, "teacher": positive - away}
        return matched(away, normalized(golden, "guidance_normalizer", y, here.x_t, teachers))
    x0_teacher = teacher(here.x_t, here.t, told)
    if golden.choice("guide_critic", False, True) and on:
        critic = GuidedDenoiser(critic, scale)
    away = critic(here.x_t, here.t, told) - x0_teacher
    teachers = {"teacher_cond": x0_teacher, "teacher": x0_teacher}
    return matched(away, normalized(golden, "normalizer", y, here.x_t, teachers))


# --- DP-DMD -----------------------------------------------------------------------------------------------------------


def dpdmd(golden: GoldenFile) -> None:
    golden.choice("differentiate_networks", False)
    golden.choice("nan_to_num", True, False)
    golden.choice("solver", "euler")
    schedule, told = golden.flow_schedule(), golden.conditioning()
    student, plain, critic = (golden.denoiser(f"k_{name}", schedule) for name in ("student", "teacher", "critic"))
    noise, grid = golden["noise_initial"], tuple(golden["sigmas_student"].tolist()[:-1])
    teacher = guided(golden, plain, "guide_teacher")

    # The first step, taught by the teacher's path.
    times = tuple(golden["sigmas_teacher"].tolist()[: golden["num_anchor_steps"].item() + 1])
    start = TeacherStart(teacher, schedule, times)
    anchor = start.end(noise, told)
    golden.check("anchor", anchor)
    velocity = start.velocity(noise, anchor, told)
    golden.check("v_target", velocity)
    sampler = Sampler(schedule, grid, "ode")
    x0, first = walked(golden, student, sampler)
    golden.check("x0", x0)
    t = torch.full((len(noise),), grid[0], dtype=torch.float64)
    space = golden.choice("distance", "mse", *SPACES)
    weight = native_weight(SPACES.get(space, "flow"), schedule, t) / native_weight("flow", schedule, t)
    loss_div = golden.over_mean(x0) * start.loss(noise, first, velocity, weight)
    golden.check("loss_div", loss_div)

    # The match of where the walk ends, and the critic there.
    a = column(golden, "sigma_dm")
    x_t = add_noise(x0.detach(), golden["noise"], schedule.coefficients(a))
    with torch.no_grad():
        x0_teacher = teacher(x_t, a, told)
        x0_critic = guided(golden, critic, "guide_critic")(x_t, a, told)
        teachers = {"teacher": x0_teacher, "teacher_cond": plain(x_t, a, told)}
        loss_dm, gradient = matched(
            x0_critic - x0_teacher, normalized(golden, "normalizer", x0.detach(), x_t, teachers)
        )
    factor = golden.loss_factor(x0)
    golden.check("loss_dm", factor * loss_dm)
    golden.check("grad_x", factor * gradient)
    weight_div = golden["weight_div"].item()
    golden.check("loss_student", factor * loss_dm + weight_div * loss_div)
    torch.autograd.backward([x0, weight_div * loss_div], [factor * gradient, None])
    golden.check("grad_k_student", student.network.k.grad)

    a = column(golden, "sigma_critic")
    there = add_noise(x0.detach(), golden["noise_critic"], schedule.coefficients(a))
    loss = denoising(golden, schedule, a, x0.detach(), critic(there, a, told), "critic_")
    golden.check("loss_critic", loss)
    golden.check("grad_k_critic", torch.autograd.grad(loss, critic.network.k)[0])


def walked(golden: GoldenFile, student: Denoiser, sampler: Sampler) -> tuple[Tensor, Tensor]:
    """Where the student's walk ends, and what its first step says, with the file's gradients."""
    noise, told = golden["noise_initial"], golden.conditioning()
    kind = golden.choice("rollout_gradient", "all_after_detached_first", "all_segments", "last_segment")
    if kind == "all_after_detached_first":
        return walk_apart(student, sampler, noise, told)
    end = rollout(student, sampler, noise, told, gradient_from=0 if kind == "all_segments" else None)
    return end, student(noise, sampler.times(0, noise), told)


CASES = {"cdm_losses": cdm, "dpdmd_losses": dpdmd}
