"""MDT-dist's golden files, compared with the trainer's own class."""

from dataclasses import replace
from typing import Any

import torch
from golden_file import GoldenFile
from mean_flow_cases import DERIVATIVES
from torch import Tensor
from vocabulary import number

from fewstep.data.batch import Batch, Real
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import FlowSchedule
from fewstep.losses.consistency import DISTANCES
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.roles import NetworkRole
from fewstep.trainers.mdt_dist import MdtDist, MdtDistConfig

#: What w in a guidance is in ours, neg + w (pos - neg).
SCALES = {"none": lambda w: 1.0, "u+w*(c-u)": lambda w: w, "c+w*(c-u)": lambda w: 1 + w}


class Given:
    """The draws of a file."""

    def __init__(self, **values: Tensor) -> None:
        self.values = values

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.values[name]

    def uniform(self, name: str) -> Tensor:
        return self.values[name]


def losses(golden: GoldenFile) -> None:
    golden.choice("target_detached", True)
    schedule = FlowSchedule(timestep_scale=1.0)
    golden.choice("schedule", "rf")
    roles = {name: NetworkRole(name, golden.denoiser(f"k_{name}", schedule)) for name in ("student", "teacher")}
    settings = times(golden) | derivative(golden)
    distance = golden.choice("distance", *DISTANCES, "mse_velocity")
    optional = {"weight_vm": "matching_weight", "weight_vd": "distillation_weight"}
    settings |= {ours: number(golden, name) for name, ours in optional.items() if given(golden, name)}
    if golden.states("vd_time_weight") and not golden.absent("vd_time_weight"):
        settings["distillation_time_weight"] = golden.choice("vd_time_weight", "1-t")
    settings["distance"] = distance.removesuffix("_velocity")
    config = MdtDistConfig(teacher="toy", out="out", data="toy", **settings)
    form = golden.choice("guidance_form", *SCALES)
    on = golden.absent("guide_teacher") or golden.choice("guide_teacher", True, False)

    def guided(name: str) -> GuidedDenoiser:
        scale = SCALES[form](number(golden, name) if form != "none" else 0.0) if on else 1.0
        return GuidedDenoiser(roles["teacher"], scale)

    method = MdtDist(config, roles, guided("w_vm"), guided("w_vd"), Sampler(schedule, (1.0,), "ode"))
    if method.difference is not None:  # the definition, at all times
        method.difference = replace(method.difference, guarded=False)
    x, conditioning = golden["x"], golden.conditioning()
    t = golden["normal" if config.times == "logit_normal" else "uniform"]
    draws = Given(t=t, noise=golden["noise"], sample_noise=golden["noise_fake"])
    batch = Batch(len(x), tuple(x.shape[1:]), conditioning, draws, Real(x, conditioning), logging=False)
    (turn,) = method.turns(0, batch)
    factor = 1.0 if config.distance != "mse" else golden.over_mean(x)
    if config.distance != "mse":
        golden.choice("reduction", "mean")
    loss_vm, *more = (factor * piece for piece, _ in turn.backward)
    loss_vd = sum(more, torch.zeros_like(loss_vm))  # a weight of 0 leaves it out
    loss = loss_vm + loss_vd
    for name, value in {"loss_vm": loss_vm, "loss_vd": loss_vd, "loss": loss}.items():
        golden.check(name, value)
    loss.backward()
    golden.check("grad_k_student", roles["student"].denoiser.network.k.grad)


def given(golden: GoldenFile, name: str) -> bool:
    """Whether a number is given, as an option or as a tensor."""
    return golden.states(name) or f"in.{name}" in golden.tensors


def times(golden: GoldenFile) -> dict[str, Any]:
    """The settings of a file's times."""
    settings: dict[str, Any] = {"times": golden.choice("time_sampler", "logit_normal", "uniform")}
    settings |= {"time_min": number(golden, "t_min"), "sigma_min": number(golden, "sigma_min")}
    for name, ours in {"p_mean": "time_mean", "p_std": "time_std"}.items():
        if not golden.absent(name):
            settings[ours] = golden.number(name)
    return settings


def derivative(golden: GoldenFile) -> dict[str, Any]:
    """The settings of the derivative and of its norm."""
    kind = DERIVATIVES[golden.choice("derivative", *DERIVATIVES)]
    settings: dict[str, Any] = {"derivative": kind}
    if kind != "exact":
        settings["derivative_step"] = number(golden, "derivative_step")
    elif golden.states("derivative_step"):
        golden.number("derivative_step")  # of no use here
    settings["normalization"] = golden.choice("tangent_normalization", "none", "norm", "norm/sqrt(dim)")
    if given(golden, "tangent_norm_eps") and not golden.absent("tangent_norm_eps"):
        settings["normalization_constant"] = number(golden, "tangent_norm_eps")
    return settings


CASES = {"mdt_dist_loss": losses}
