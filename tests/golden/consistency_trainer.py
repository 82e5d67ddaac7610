"""What the golden cases of the consistency family share: the trainer's own class on toy networks."""

import json
import math
from functools import partial

import torch
from golden_file import GoldenFile
from torch import Tensor
from toy_network import toy_conditioning, toy_denoiser

from fewstep.diffusion.discretization import TimePair
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, NoiseSchedule
from fewstep.losses.consistency import DISTANCES, WEIGHTINGS, hard_boundary, weight
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.trainers.consistency import Boundary, Comparison, Consistency, ConsistencyConfig

SOLVERS = {"none": "none", "euler": "euler", "ddim": "euler", "heun": "heun"}
NATURAL = partial(hard_boundary, lowest=-math.inf)  # f is x0 itself


def given(golden: GoldenFile, name: str) -> bool:
    """Whether the file states an option; what does not apply to a file is absent."""
    return name in json.loads(golden.metadata["options"])


def schedule_of(golden: GoldenFile) -> NoiseSchedule:
    """EDM, its ramp where the file states one, or flow matching."""
    if golden.choice("schedule", "edm", "rf") == "rf":
        return FlowSchedule()
    ramp = ("sigma_min", "sigma_max", "rho", "sigma_data")
    return EDMSchedule(**{name: golden.number(name) for name in ramp if given(golden, name)})


def network(golden: GoldenFile, coefficients: str, schedule: NoiseSchedule) -> NetworkDenoiser:
    """A toy network under any of the family's schedules."""
    if not isinstance(schedule, FlowSchedule):
        return golden.denoiser(coefficients, schedule)
    golden.choice("prediction_type", "velocity")
    golden.choice("toy_time", "t")
    return toy_denoiser(golden[coefficients], schedule, "flow", 1000.0)


def guided(golden: GoldenFile, schedule: NoiseSchedule, on: bool) -> GuidedDenoiser:
    """The teacher; guided by ``in.guidance_scale`` where there is one, else by the scale of each sample."""
    null = toy_conditioning(torch.zeros(1, dtype=torch.float64))
    scale = golden["guidance_scale"].item() if on and "in.guidance_scale" in golden.tensors else 1.0
    return GuidedDenoiser(network(golden, "k_teacher", schedule), null if on else None, scale)


def trainer(golden: GoldenFile, schedule: NoiseSchedule, boundary: Boundary, **settings) -> Consistency:
    """The trainer's own class on toy networks, told the file's choices."""
    golden.choice("target_detached", True)
    distance = golden.choice("distance", *DISTANCES)
    weighting = golden.choice("weighting", *WEIGHTINGS) if given(golden, "weighting") else "uniform"
    solver = SOLVERS[golden.choice("solver", *SOLVERS)] if given(golden, "solver") else "none"
    form = golden.choice("guidance_form", "none", "u+w*(c-u)", "c+w*(c-u)")
    config = ConsistencyConfig(
        teacher="toy", out="out", data="toy", solver=solver, distance=distance, weighting=weighting, **settings
    )
    roles = {"student": network(golden, "k_student", schedule)}
    if golden.choice("target_network", "student", "separate") == "separate":
        roles["target"] = network(golden, "k_target", schedule)
    teacher = guided(golden, schedule, form != "none") if solver != "none" else None
    return Consistency(config, roles, teacher, Sampler(schedule, (1.0,), "fresh"), None, boundary)


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
    apart = method.distance(seen)
    return apart, weight(method.weighting, pair.sigma_t, pair.sigma_r, method.sigma_data) * apart
