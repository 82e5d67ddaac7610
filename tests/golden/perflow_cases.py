"""Golden files of PeRFlow, compared with what the trainer is made of."""

import torch
from golden_file import GoldenFile
from toy_network import toy_denoiser

from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import TableSchedule
from fewstep.diffusion.timesteps import even_grid
from fewstep.diffusion.windows import Window, on_chord, slope, window_at
from fewstep.losses.consistency import DISTANCES
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.roles import NetworkRole
from fewstep.trainers.perflow import Chord, PerFlow, PerFlowConfig

FORMS = {"ddim_eps": "ddim_eps", "diff_eps": "diff_eps", "velocity": "velocity", "data_minus_noise": "velocity"}
SOLVERS = {"ddim": "euler", "euler": "euler", "heun": "heun"}
SPACES = {"mse_velocity": ("velocity", "data_minus_noise"), "mse_epsilon": ("ddim_eps", "diff_eps")}


def number(golden: GoldenFile, name: str) -> float:
    """A number that is an option, or a tensor."""
    return golden.number(name) if golden.states(name) else golden[name].item()


def guided_teacher(golden: GoldenFile, schedule: TableSchedule) -> GuidedDenoiser:
    kind, sign = golden.kind("teacher_prediction_type")
    teacher = toy_denoiser(golden["k_teacher"], schedule, kind, 1000.0, sign)
    forms = {"none": None, "u+w*(c-u)": 0.0, "c+w*(c-u)": 1.0}
    form, on = forms[golden.choice("guidance_form", *forms)], golden.choice("guide_teacher", True, False)
    scale = number(golden, "guidance_scale") if golden.states("guidance_scale") or form is not None else 1.0
    if form is None or not on:
        return GuidedDenoiser(teacher, 1.0, further=0)
    return GuidedDenoiser(teacher, scale + form)


def perflow_loss(golden: GoldenFile) -> None:
    windows, steps, count = (
        int(golden["num_windows"]),
        int(golden["solver_steps"]),
        golden.number("num_train_timesteps"),
    )
    said_as = golden.choice("prediction_type", *FORMS)
    form = FORMS[said_as]
    sign = -1 if said_as == "data_minus_noise" else 1
    kinds = [*DISTANCES, *(name for name, spaces in SPACES.items() if said_as in spaces)]
    distance = golden.choice("distance", *kinds)
    weightings = {"uniform": "uniform", "1/(2.3*max(1-t,0.1))": "noisy"}
    settings = {
        "form": form,
        "solver": SOLVERS[golden.choice("solver", *SOLVERS)],
        "distance": "mse" if distance in SPACES else distance,
        "weighting": weightings[golden.choice("weighting", *weightings)],
        "huber_c": number(golden, "huber_c") if "pseudo_huber" in distance else None,
        "first_window": "data",
    }
    golden.choice("toy_time", "timestep/1000")

    # The times of the source are those of the products that it used, whatever it rounds them by.
    names = ("window_start", "window_end", "solver", "solver_prev")
    table = golden.table_schedule(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.float64))
    entries = {name: entry_of(table, golden[f"abar_{name}"]) for name in names}
    used = torch.cat([entries[name].flatten() for name in names])
    products = torch.cat([golden[f"abar_{name}"].flatten() for name in names])
    schedule = golden.table_schedule(used[used >= 0], products[used >= 0])
    at = {name: schedule.time(entries[name]) for name in names}

    # The trainer on the toys.
    config = PerFlowConfig(teacher="toy", out="out", data="toy", steps=windows, solver_steps=steps, **settings)
    student = toy_denoiser(golden["k_student"], schedule, "epsilon", 1000.0)
    roles = {"student": NetworkRole("student", student)}
    method = PerFlow(
        config, roles, guided_teacher(golden, schedule), Sampler(schedule, tuple(even_grid(windows).tolist()), "ode")
    )
    x, noise, conditioning = golden["x"], golden["noise"], golden.conditioning()
    t = method.at(golden["uniform"])
    golden.check("t", t)
    window = window_at(method.windows, t)
    golden.check("t_start", window.start)
    golden.check("t_end", window.end)
    levels = Window(at["window_start"], at["window_end"])
    x_s = method.start(x, noise, levels)
    golden.check("x_start", x_s)
    x_e = method.walk(x_s, at["solver"].unbind(1), at["solver_prev"].unbind(1), conditioning, noise)
    golden.check("x_end", x_e)
    # The source's lines are those of x_t over t, whatever its network says of them.
    x_t = on_chord(x_s, x_e, window.start, window.end, t)
    golden.check("x_t", x_t)
    if form == "velocity":
        target = sign * slope(x_s, x_e, window.start, window.end)
    else:
        target = method.target(Chord(levels, t, x_s, x_e, x_t))
    golden.check("target", target)
    # Its networks are told one more than the table's entry.
    raw = student.network(x_t, t * count / 1000, conditioning.arguments()["cond"])
    losses, entries_each = method.loss(raw, target, t), x[0].numel()
    reductions = {
        "mean": losses.mean(),
        "sum_over_batch_size": losses.mean() * entries_each,
        "half_sum_over_batch_size": losses.mean() * entries_each / 2,
        "sum_per_sample": losses * entries_each,
    }
    reduced = reductions[golden.choice("reduction", *reductions)]
    golden.check("loss", reduced)
    reduced.mean().backward()
    golden.check("grad_k_student", student.network.k.grad)
    assert method.teacher.denoiser.network.k.grad is None


def entry_of(table: TableSchedule, products: torch.Tensor) -> torch.Tensor:
    """Where a table has these products; -1 for the clean sample's, which is 1."""
    all_of_them = torch.cat([torch.ones(1, dtype=torch.float64), table.alphas_cumprod])
    return (all_of_them - products[..., None]).abs().argmin(-1) - 1


CASES = {"perflow_loss": perflow_loss}
