"""TwinFlow's golden files, compared with the trainer's own class."""

import torch
from any_flow_cases import Given
from golden_file import GoldenFile
from mean_flow_cases import SCHEDULE, Telling
from torch import Tensor
from toy_network import ToyNetwork, ToyRecipe, toy_conditioning

from fewstep.data.batch import Batch, Real
from fewstep.diffusion.placed_times import spread_places
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.signed_times import PARTS
from fewstep.losses.twin_flow import DISTANCES, distance, gap_weight
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.networks.flow_map import FlowMapDenoiser
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.roles import NetworkRole
from fewstep.trainers.twin_flow import TwinFlow, TwinFlowConfig

GAP = "1+tan((1-(|t|-|r|))*pi/2.5)"
WEIGHTINGS = {GAP: "gap", "uniform": "uniform"}
#: What the file's number is of the ratio at which guidance is added to data's velocity ...
ADDED = {"none": lambda w: 0.0, "v+w*(c-u)": lambda w: w, "v+(1-1/w)*(c-u)": lambda w: 1 - 1 / w}
#: ... and of the scale of a velocity that is the reference's.
SCALES = {"u+w*(c-u)": lambda w: w, "c+w*(c-u)": lambda w: 1 + w}


class SignedToy(ToyNetwork):
    """A toy network at signed times, as it is told them: a gap, or a number below 0 for the twin."""

    gap: Tensor

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        twin = self.gap < 0
        return super().forward(x, torch.where(twin, -t, t), cond, torch.where(twin, -t, t - self.gap))


class Drawn(Given):
    """The draws of a file, some of which the host knows."""

    device, step = "cpu", 0

    def numbers(self, name: str) -> list[float]:
        return self.draws[name].tolist()


def toy(golden: GoldenFile, coefficients: str) -> FlowMapDenoiser:
    """A toy network of two times, as in the file the frozen one is, too."""
    kind, sign = golden.kind("prediction_type")
    golden.choice("schedule", "rf")
    golden.choice("toy_time", "t")
    network = SignedToy(golden[coefficients])
    return FlowMapDenoiser(NetworkDenoiser(network, ToyRecipe(1.0, sign), SCHEDULE, kind), Telling())


def loss(golden: GoldenFile) -> None:
    golden.choice("target_detached", True)
    method = trainer(golden)
    batch = given(golden, method)
    (turn,) = method.turns(0, batch)
    ((value, _),) = turn.backward
    value = golden.over_mean(golden["noise"]) * value
    golden.check("loss", value)
    golden.check("grad_k_student", torch.autograd.grad(value, method.student.student.network.k)[0])


def trainer(golden: GoldenFile) -> TwinFlow:
    """The trainer's own class on toy networks."""
    form, w = golden.choice("guidance_form", *ADDED, *SCALES), golden["enhanced_ratio"].item()
    source = "student_no_grad"
    if not golden.absent("reference"):
        source = golden.choice("reference", "student_no_grad", "frozen")
    images = not golden.absent("image_free") and golden.choice("image_free", True, False)
    parts = golden.choice("batch_parts", golden.text("batch_parts")).split(",")
    assert {*parts} <= {*PARTS}
    kind = golden.choice("distance", *DISTANCES)
    adv = golden.choice("adv_weighting", *WEIGHTINGS)
    weight = 1.0 if adv == "uniform" else gap_weight(torch.zeros(())).item()
    of_parts = {"mul": ("mul_fraction", golden.number("mul_fraction")), "adv": ("adversarial_weight", weight)}
    config = TwinFlowConfig(
        teacher="toy",
        out="out",
        data=None if images else "toy",
        image_free=images,
        velocity="teacher" if form in SCALES else "data",
        parts=parts,
        order=int(golden["order"].item()),
        first_step=golden.number("derivative_step"),
        target_clamp=None if golden.absent("target_clamp") else golden.number("target_clamp"),
        guidance_t_min=golden.number("guidance_t_min"),
        guidance_t_max=golden.number("guidance_t_max"),
        label_drop=0.0,
        **{name: own for part, (name, own) in of_parts.items() if part in parts},
        match_weight=golden.number("match_factor"),
        weighting=WEIGHTINGS[golden.choice("weighting", *WEIGHTINGS)],
        time_min=1e-9,
    )
    student, frozen = (toy(golden, name) for name in ("k_student", "k_teacher" if source == "frozen" else "k_student"))
    roles = {"student": NetworkRole("student", student), "teacher": NetworkRole("teacher", frozen)}
    method = TwinFlow(config, roles, GuidedDenoiser(frozen, 1.0), Sampler(SCHEDULE, (1.0,), "ode"))
    asked = frozen if source == "frozen" else student
    method.guide = GuidedDenoiser(asked.velocity, SCALES[form](w) if form in SCALES else 1.0)
    method.ratio = ADDED[form](w) if form in ADDED else 0.0
    constants = {}
    for name in ("alpha", "c", "eps"):
        if not golden.absent(f"distance_{name}"):
            constants[name] = golden.number(f"distance_{name}")
    if not golden.absent("huber_c"):
        constants["c"] = golden.number("huber_c")
    method.distance = lambda a, b: distance(kind, a, b, **constants)
    return method


def given(golden: GoldenFile, method: TwinFlow) -> Batch:
    """The file's batch, whose samples lie in the order of their places."""
    noise, conditioning = golden["noise"], toy_conditioning(golden["cond"])
    size = len(noise)
    part = [method.parts.at(place, size, 0) for place in range(size)]

    def spread(name: str, kind: str) -> Tensor:
        """What the file draws for one part, among numbers for all."""
        drawn = golden[name]
        whole = torch.full((size, *drawn.shape[1:]), 0.5, dtype=drawn.dtype)
        return whole.index_copy(0, torch.tensor([row for row in range(size) if part[row] == kind]), drawn)

    draws = {"t": golden["t_draw"], "any": golden["u_any"], "mul": golden["u_mul"], "noise": noise}
    draws |= {"fake_noise": spread("noise_fake", "adv"), "match_noise": spread("noise_match", "e2e")}
    draws["match_time"] = spread("s_match", "e2e")
    if "in.noise_images" in golden.tensors:
        draws["image_noise"] = golden["noise_images"]
    places = spread_places(size)
    drawn = Drawn(draws, [places.index(row) for row in range(size)])
    x = golden.tensors.get("in.x", torch.zeros_like(noise))
    return Batch(size, tuple(noise.shape[1:]), conditioning, drawn, Real(x, conditioning), logging=False)


CASES = {"twinflow_loss": loss}
