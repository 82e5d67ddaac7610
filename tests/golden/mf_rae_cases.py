"""mf-rae's golden files, compared with the trainers' own classes."""

from golden_file import GoldenFile
from mean_flow_cases import (
    OF_TEACHER,
    SCHEDULE,
    Given,
    check_gradient,
    conditions,
    losses,
    number,
    played,
    student,
    teacher,
    trainer,
)
from toy_network import toy_conditioning

from fewstep.diffusion.ode import SOLVERS, OdeSolver
from fewstep.diffusion.trajectories import LABEL_TIMES, trajectories
from fewstep.losses.consistency import DISTANCES, distance
from fewstep.networks.guidance import GuidedDenoiser


def distillation(golden: GoldenFile) -> None:
    source = golden.choice("velocity_source", "teacher", "data")
    times = {"times": "uniform", "time_max": golden.number("uniform_scale"), "time_shift": number(golden, "shift")}
    method = trainer(golden, velocity=source, **times)
    coins = {"apart": (golden["r_equals_t"] == 0).tolist(), "label_drop": [False] * len(golden["x"])}
    drawn = dict(zip("tr", golden["uniforms"].unbind(1), strict=True))
    flow, target = played(golden, method, Given(golden["noise"], drawn, coins))
    golden.check("t", flow.t)
    golden.check("r", flow.r)
    _, each = losses(method, flow, target)
    golden.check("loss_per_sample", each)
    for name in golden.expected("loss|loss_mean"):
        golden.check(name, each.mean())
    check_gradient(golden, each.mean(), method.student)


def trajectory_pairs(golden: GoldenFile) -> None:
    golden.choice("velocity_source", "teacher")
    golden.choice("target_detached", True)
    golden.choice("reduction", "mean")
    golden.choice("pair_order", "i_outer_j_inner_sample_last")
    form = golden.choice("guidance_form", *OF_TEACHER)
    scale = OF_TEACHER[form](0.0 if form == "none" else number(golden, "guidance_scale", "w"))
    solver = OdeSolver(GuidedDenoiser(teacher(golden), scale), SCHEDULE, golden.choice("solver", *SOLVERS))
    cond, labels = conditions(golden, "noise"), golden.choice("label_times", *LABEL_TIMES)
    *times, end = golden["sigmas"].tolist()
    assert end == 0  # a walk ends at the clean sample
    walks = trajectories(solver, golden["noise"], times, toy_conditioning(cond), labels)
    pair, sample = golden["index"] // len(cond), golden["index"] % len(cond)
    chord = walks.chords(pair, sample)
    kind = golden.choice("distance", *DISTANCES, "mse_velocity")
    c = number(golden, "huber_c") if "huber" in kind else 0.0
    denoiser = student(golden)
    u = denoiser.velocity(chord.x_t, chord.t, toy_conditioning(cond[sample]), chord.r)
    each = distance(kind.removesuffix("_velocity"), u, chord.velocity, c)
    golden.check("loss_per_sample", each)
    golden.check("loss", each.mean())
    check_gradient(golden, each.mean(), denoiser)


CASES = {
    "mfrae_cmt_loss": trajectory_pairs,
    "meanflow_mfrae_loss": distillation,
}
