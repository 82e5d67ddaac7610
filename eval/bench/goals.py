"""Single goals of the training core, each measured beside what it is compared with: kept bytes, losses, updates, roles.

What is theirs is restated in our words, and no part of the package's core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.eval.bench.calls import recording_of
from fewstep.eval.bench.table import Table
from fewstep.eval.bench.timing import Clock, alternate, ratios
from fewstep.kernels.adamw import adamw
from fewstep.kernels.guided_x0 import guided_x0
from fewstep.kernels.renoise import renoise
from fewstep.kernels.score_gap import score_gap
from fewstep.kernels.updates import Follower, Moments, Rule
from fewstep.losses.huber import pseudo_huber
from fewstep.losses.mean_flow import mean_flow_target, weighted_loss
from fewstep.losses.score_identity import score_identity
from fewstep.programs.methods import method_class
from fewstep.programs.planning.dry_run import DryRun, backward
from fewstep.recording import Recording
from fewstep.training.method import Method, Turn

TEACHER = "fashion-sd"
#: Latents of the chains, and the parameters of the update: how many, and their shape.
LATENTS, FULL_LATENTS = (4, 4, 128, 128), (1, 16, 21, 60, 104)
PARAMETERS, FULL_PARAMETERS = (1200, 64, 64), (1200, 148, 148)
#: The largest error of a chain, relative to the largest entry.
_ERROR = 5e-6


@dataclass(frozen=True)
class Goal:
    """One number and what it should be.

    Attributes:
        number: of the goal, as docs/performance.md lists them.
        what: is measured.
        measured: in words; value: as a number.
        value: see measured.
        wanted: in words.
        met: whether it is so.
        exact: whether it has nothing to do with the machine's speed: then a miss is a failure.
    """

    number: int
    what: str
    measured: str
    value: float
    wanted: str
    met: bool
    exact: bool = False


def measure(device: torch.device, *, full: bool = False, compiled: bool = False, blocks: int = 5) -> Table:
    """All of them.

    Args:
        device: on which.
        full: larger latents and parameters.
        compiled: chains of losses under torch.compile, too.
        blocks: of what is timed.
    """
    recording = recording_of(TEACHER)
    found = [
        *kept(recording),
        *chains(device, FULL_LATENTS if full else LATENTS, blocks, compiled),
        *update(device, FULL_PARAMETERS if full else PARAMETERS, blocks),
        *roles(recording, blocks),
    ]
    table = Table("Single goals of the core", ("goal", "what", "measured", "wanted", "met"))
    for goal in found:
        table.add([str(goal.number), goal.what, goal.measured, goal.wanted, "yes" if goal.met else "NO"], **vars(goal))
        if goal.exact and not goal.met:
            table.failures.append(f"{goal.what}: {goal.measured}, wanted {goal.wanted}")
    table.notes += [
        "3 and 7 on fashion-sd; 5: forward and gradient beside the same formulas in float64; 6: test, clip, AdamW and "
        "an average beside a loop over tensors. Speeds depend on the machine; only what does not ends with code 1."
    ]
    return table


# --- 3: what frozen networks keep -----------------------------------------------------------------------------------


def kept(recording: Recording) -> Iterator[Goal]:
    """Bytes that the student's turn of DMD2 keeps of teacher and critic, without a GAN and with one."""
    whole = 0
    for gan in (False, True):
        run, method = prepared(recording, "dmd2", **({"gan_weight": 0.1, "data": "fashion"} if gan else {}))
        taken = {}
        for name in ("teacher", "critic", "student"):
            with Kept(method, name) as counter:
                next(iter(method.turns(0, run.batch(0))))
            taken[name] = counter.bytes
        words = "with a GAN" if gan else "no GAN"
        whole = taken["student"] if not gan else whole
        yield _exact(3, f"DMD2, {words}: bytes kept of the teacher", taken["teacher"], "0", taken["teacher"] == 0)
        if not gan:
            yield _exact(3, f"DMD2, {words}: bytes kept of the critic", taken["critic"], "0", taken["critic"] == 0)
        else:
            share = taken["critic"] / whole
            yield _exact(
                3, "DMD2, with a GAN: kept of the critic, to its tap / a whole pass", share, "< 0.8", share < 0.8
            )


class Kept:
    """Inside, the bytes that a role's calls keep for a backward pass, weights left out.

    Args:
        method: whose role it is.
        name: of the role.
    """

    def __init__(self, method: Method, name: str) -> None:
        denoiser: Any = next(iter(method.roles[name].experts.values())).denoiser
        self.denoiser, self._stack = denoiser, ExitStack()
        self._weights = {parameter.untyped_storage()._cdata for parameter in denoiser.network.parameters()}
        self._storages: dict[int, torch.UntypedStorage] = {}

    @property
    def bytes(self) -> int:
        """So far."""
        return sum(storage.nbytes() for storage in self._storages.values())

    def __enter__(self) -> Kept:
        for called in ("raw", "features"):
            setattr(self.denoiser, called, partial(self._watched, getattr(self.denoiser, called)))
            self._stack.callback(delattr, self.denoiser, called)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _watched(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            return function(*args, **kwargs)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._weights:
            self._storages[storage._cdata] = storage
        return tensor


# --- 5: chains of losses --------------------------------------------------------------------------------------------


def distribution_matching(samples: list[Tensor], per_sample: Tensor) -> Tensor:
    """DMD: a noised sample, two networks' answers to it, guided, and the gradient (B, ...) between them."""
    x0, noise, positive, negative, critic = samples
    alpha, sigma = (1 - per_sample**2).sqrt(), per_sample
    x_t = renoise(x0, noise, alpha, sigma)
    x0_teacher = guided_x0(x_t, 1 / alpha, -sigma / alpha, positive, negative, 7.5)
    x0_critic = guided_x0(x_t, 1 / alpha, -sigma / alpha, critic)
    return score_gap(x0_critic, x0_teacher, x0, normalizer_min=1e-5)[1]


def _sid(samples: list[Tensor], per_sample: Tensor) -> Tensor:
    x0, x0_teacher, x0_critic = samples[:3]
    return score_identity(x0, x0_teacher, x0_critic, 1.2, per_sample).sum()


def _mean_flow(samples: list[Tensor], per_sample: Tensor) -> Tensor:
    u, velocity, change = samples[:3]
    return weighted_loss(u, mean_flow_target(velocity, change, per_sample), "sum", 1.0, 1e-3).sum()


def _huber(samples: list[Tensor], _per_sample: Tensor) -> Tensor:
    return pseudo_huber(samples[0] - samples[1], 0.03).sum()


#: By name the loss, () or its gradient (B, ...), of five samples and a number for each, and of how many it is derived.
CHAINS: dict[str, tuple[Callable[[list[Tensor], Tensor], Tensor], int]] = {
    "DMD": (distribution_matching, 0),
    "SiD": (_sid, 3),
    "MeanFlow": (_mean_flow, 1),
    "pseudo-Huber": (_huber, 1),
}


def chains(device: torch.device, shape: tuple[int, ...], blocks: int, compiled: bool) -> Iterator[Goal]:
    """Each chain in float32 beside its definition in float64, to which float32 samples are cast first."""
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(shape, generator=generator).to(device) for _ in range(5)]
    per_sample = (0.8 * torch.rand(shape[0], generator=generator) + 0.1).to(device)
    for name, (chain, derived) in CHAINS.items():
        works = {"float64": partial(_played, chain, samples, per_sample, derived, torch.float64)}
        works["eager"] = partial(_played, chain, samples, per_sample, derived, torch.float32)
        if compiled:
            fused = torch.compile(chain)
            works["compiled"] = partial(_played, fused, samples, per_sample, derived, torch.float32)
        exact, seconds = works["float64"](), alternate(works, Clock(device), blocks)
        for form, wanted in (("eager", 2.0), ("compiled", 4.0))[: len(works) - 1]:
            pairs = zip(works[form](), exact, strict=True)
            error = max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)
            gain = ratios(seconds["float64"], seconds[form])
            what, size = f"{name}, {form}", "x".join(map(str, shape))
            met = gain.median >= wanted
            yield Goal(5, f"{what}, at {size}", f"{gain.words()} x", gain.median, f">= {wanted:g} x", met)
            yield _exact(5, f"{what}: error", error, f"<= {_ERROR:.0e}", error <= _ERROR)


def _played(
    chain: Callable[[list[Tensor], Tensor], Tensor],
    samples: list[Tensor],
    per_sample: Tensor,
    derived: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    """What a chain says, and its gradients, in float64."""
    leaves = [sample.detach().requires_grad_(place < derived) for place, sample in enumerate(samples)]
    said = chain([leaf.to(dtype) for leaf in leaves], per_sample.to(dtype))
    gradients = torch.autograd.grad(said, leaves[:derived]) if derived else ()
    return [one.detach().double() for one in (said, *gradients)]


# --- 6: the optimizer phase -----------------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts numbers that the host reads inside."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As the operation."""
        aten = torch.ops.aten
        self.count += function in (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default)
        return function(*args, **(kwargs or {}))


def update(device: torch.device, shape: tuple[int, ...], blocks: int) -> Iterator[Goal]:
    """Finite test, clip, AdamW and an average in one pass, beside a loop over the tensors."""
    generator = torch.Generator().manual_seed(0)
    p, g, e = ([torch.randn(shape[1:], generator=generator).to(device) for _ in range(shape[0])] for _ in range(3))
    moments, follower = Moments([one.clone() for one in p]), Follower([one.clone() for one in e], 0.01)
    theirs = [torch.nn.Parameter(one) for one in p]
    optimizer = torch.optim.AdamW(theirs, lr=1e-3, foreach=False, fused=False)

    def together() -> None:
        norm = torch.nn.utils.get_total_norm(g)
        scale, skip = (1.0 / (norm + 1e-6)).clamp(max=1.0), (~torch.isfinite(norm)).float()
        adamw(moments, [one.clone() for one in g], Rule(lr=1e-3), scale=scale, skip=skip, followers=[follower])

    def one_by_one() -> None:
        for parameter, gradient in zip(theirs, g, strict=True):
            parameter.grad = gradient.clone()
            if not bool(torch.isfinite(gradient).all()):
                return
        torch.nn.utils.clip_grad_norm_(theirs, 1.0, foreach=False)
        optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(e, theirs, strict=True):
                average.copy_(torch.lerp(average, parameter, 0.01))

    with Reads() as reads:
        together()
    one_by_one()
    pairs = [*zip(moments.parameters, theirs, strict=True), *zip(follower.tensors, e, strict=True)]
    far = max(float((one - other).detach().abs().max()) for one, other in pairs if one is not None)
    seconds = alternate({"ours": together, "theirs": one_by_one}, Clock(device), blocks)
    gain = ratios(seconds["theirs"], seconds["ours"])
    size = "x".join(map(str, shape[1:]))
    yield Goal(6, f"{shape[0]} of {size}", f"{gain.words()} x", gain.median, ">= 3 x", gain.median >= 3)
    yield _exact(6, "the update: numbers that the host reads", reads.count, "0", reads.count == 0)
    yield _exact(6, "the update: largest difference of the two", far, "<= 1e-06", far <= 1e-6)


# --- 7: roles that are adapters -------------------------------------------------------------------------------------


def roles(recording: Recording, blocks: int) -> Iterator[Goal]:
    """Entering a role beside PEFT's own switch, and gradients with and without gradient checkpointing."""
    _, method = prepared(recording, "dmd2", lora_rank=4)
    denoisers = [next(iter(method.roles[name].experts.values())).denoiser for name in ("student", "critic")]
    network: Any = denoisers[0].network
    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    names = sorted(layers[0].r)[:2]
    before = [parameter.requires_grad for parameter in network.parameters()]

    def entered(times: int = 1) -> None:
        for denoiser in denoisers * times:
            with denoiser.active():
                pass

    def switched(times: int) -> None:
        for name in names * times:
            for layer in layers:
                layer.set_adapter([name])

    entered()
    same = before == [parameter.requires_grad for parameter in network.parameters()]
    works = {"ours": partial(entered, 20), "theirs": partial(switched, 20)}
    seconds = alternate(works, Clock(torch.device("cpu")), blocks)
    gain = ratios(seconds["theirs"], seconds["ours"])
    yield Goal(7, "two roles entered and left", f"{gain.words()} x", gain.median, ">= 10 x", gain.median >= 10)
    yield _exact(7, "entering a role: requires_grad changed", float(not same), "0", same)
    for name in ("dmd2", "sid"):
        plain, again = (gradients(recording, name, checkpointing) for checkpointing in (False, True))
        far = max(float((one - other).abs().max()) for one, other in zip(plain, again, strict=True))
        yield _exact(7, f"{name}, LoRA: gradients under checkpointing differ by", far, "0", far == 0)


def gradients(recording: Recording, name: str, checkpointing: bool) -> list[Tensor]:
    """Of every turn of a method's first step."""
    run, method = prepared(recording, name, lora_rank=4, gradient_checkpointing=checkpointing)
    found = []
    for turn in method.turns(0, run.batch(0)):
        if isinstance(turn, Turn):
            backward(method, turn)
            for parameter in method.roles[turn.role].parameters():
                found += [] if parameter.grad is None else [parameter.grad]
                parameter.grad = None
    return found


def prepared(recording: Recording, name: str, **settings: Any) -> tuple[DryRun, Method]:
    """A method on a teacher, with two steps and two samples in a batch, and what makes its batches."""
    given = {"teacher": TEACHER, "out": "", "steps": 2, "batch_size": 2, "cpu": True, **settings}
    run = DryRun(method_class(name).Config(**given), name, recording)
    return run, run.prepare()


def _exact(number: int, what: str, value: float, wanted: str, met: bool) -> Goal:
    return Goal(number, what, f"{value:.3g}", float(value), wanted, met, exact=True)
