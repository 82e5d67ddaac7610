"""What the golden cases of the consistency family share: the trainer's own class on toy networks."""

import math
from functools import partial

from golden_file import GoldenFile
from torch import Tensor
from vocabulary import MORE, TIME_WEIGHTS, time_weight

from fewstep.diffusion.discretization import TimePair
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, NoiseSchedule, TrigFlowSchedule
from fewstep.losses.consistency import DISTANCES, WEIGHTINGS, hard_boundary, weight
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.trainers.consistency import Boundary, Comparison, Consistency, ConsistencyConfig

SOLVERS = {"none": "none", "euler": "euler", "ddim": "euler", "heun": "heun"}
NATURAL = partial(hard_boundary, lowest=-math.inf)  # f is x0 itself


def given(golden: GoldenFile, name: str) -> bool:
    """Whether the file states an option; what does not apply to a file is absent, or none."""
    return not golden.absent(name)


def schedule_of(golden: GoldenFile) -> NoiseSchedule:
    """EDM, its ramp where the file states one, flow matching or TrigFlow."""
    kind = golden.choice("schedule", "edm", "rf", "trigflow")
    ramp = {
        name: golden.number(name) for name in ("sigma_min", "sigma_max", "rho", "sigma_data") if given(golden, name)
    }
    if kind == "edm":
        return EDMSchedule(**ramp)
    schedule = FlowSchedule() if kind == "rf" else TrigFlowSchedule()
    # The networks of these say no x0 of a scale; the weights of their losses do.
    schedule.sigma_data = ramp.get("sigma_data", 0.5)
    return schedule


def network(golden: GoldenFile, coefficients: str, schedule: NoiseSchedule) -> NetworkDenoiser:
    """A toy network under any of the family's schedules."""
    return golden.denoiser(coefficients, schedule)


def trainer(golden: GoldenFile, schedule: NoiseSchedule, boundary: Boundary, **settings) -> Consistency:
    """The trainer's own class on toy networks, told the file's choices."""
    golden.choice("target_detached", True)
    distance = golden.choice("distance", *DISTANCES, "mse_x0")  # which it is in any case
    weighting = golden.choice("weighting", *WEIGHTINGS, *TIME_WEIGHTS) if given(golden, "weighting") else "uniform"
    solver = SOLVERS[golden.choice("solver", *SOLVERS)] if given(golden, "solver") else "none"
    if given(golden, "objective"):  # which says the same once more
        objective = golden.choice("objective", "distillation", "training")
        assert (objective == "training") == (solver == "none"), f"the objective {objective} has the solver {solver}"
    settings = {"solver": solver, "distance": "mse" if distance == "mse_x0" else distance, **settings}
    settings["weighting"] = weighting if weighting in WEIGHTINGS else "uniform"
    config = ConsistencyConfig(teacher="toy", out="out", data="toy", **settings)
    roles = {"student": network(golden, "k_student", schedule)}
    if golden.choice("target_network", "student", "separate") == "separate":
        roles["target"] = network(golden, "k_target", schedule)
    golden.choice("guidance_form", *MORE)
    teacher = guided_teacher(golden, schedule) if solver != "none" else None
    return Consistency(config, roles, teacher, Sampler(schedule, (1.0,), "fresh"), None, boundary)


def guided_teacher(golden: GoldenFile, schedule: NoiseSchedule) -> GuidedDenoiser:
    """The teacher; guided by ``in.guidance_scale`` where there is one, else by the scale of each sample."""
    teacher, more = network(golden, "k_teacher", schedule), MORE[golden.choice("guidance_form", *MORE)]
    if more is None:
        return GuidedDenoiser(teacher, 1.0, further=0)
    scale = golden["guidance_scale"].item() + more if "in.guidance_scale" in golden.tensors else 1.0
    return GuidedDenoiser(teacher, scale)


def huber_c(golden: GoldenFile, name: str = "huber_c") -> float:
    """c of the pseudo-Huber distances; a file of another distance need not have one."""
    if given(golden, name):
        return golden.number(name)
    return golden[name].item() if f"in.{name}" in golden.tensors else 0.0


def mapping_k(golden: GoldenFile) -> float:
    """k of ECT's mapping; a constant one is that of k = 0."""
    k = golden.number("mapping_k") if given(golden, "mapping_k") else 0.0
    return k if golden.choice("mapping", "sigmoid", "const") == "sigmoid" else 0.0


def check_gradient(golden: GoldenFile, method: Consistency, loss: Tensor) -> None:
    """Of the student's coefficients; teacher and target get none."""
    loss.backward()
    golden.check("grad_k_student", method.student.network.k.grad)
    outside = [method.teacher.denoiser] if method.teacher is not None else []
    outside += [method.target] if method.target is not method.student else []
    assert all(other.network.k.grad is None for other in outside)


def weighted(golden: GoldenFile, method: Consistency, seen: Comparison, pair: TimePair) -> tuple[Tensor, Tensor]:
    """The distance and the weighted loss of each sample."""
    apart, name = (
        method.distance(seen),
        golden.choice("weighting", *WEIGHTINGS, *TIME_WEIGHTS) if given(golden, "weighting") else None,
    )
    if name in TIME_WEIGHTS and name not in WEIGHTINGS:
        return apart, time_weight(name, method.schedule, pair.t) * apart
    return apart, weight(method.weighting, pair.sigma_t, pair.sigma_r, method.sigma_data) * apart
