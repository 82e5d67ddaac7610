"""Distilling a network that is no pipeline's: any ``torch.nn.Module``, for latents of any rank, dense or sparse.

The network is called ``network(x_t, t, **condition)``: x_t (B, ...) noised samples, t (B,) the schedule's timestep (of
flow matching 1000 times the time), and what it is told, one tensor (B, ...) for each name of the samples' conditions.
It answers (B, ...) in its prediction type. A condition named ``present`` is the mask of sparse samples: (B, N) for
samples (B, N, ...), objects of unequally many entries that are padded to one size.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.conditioning.conditioning import Conditioning
from fewstep.conditioning.tree import Leaf
from fewstep.config.run import RunConfig
from fewstep.data.batch import Batches, Real
from fewstep.data.durable import nothing_left, write_durably
from fewstep.diffusion.draws import keyed_order
from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.diffusion.schedule import FlowSchedule, NoiseSchedule
from fewstep.diffusion.timesteps import even_grid
from fewstep.errors import Interrupted, UserError
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.networks.derivative import refuse_underivable
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.roles import NetworkRole, Role, follow
from fewstep.programs.methods import method_class
from fewstep.training.best import Best
from fewstep.training.checkpoint import find_latest
from fewstep.training.distributed import Processes, join_launch
from fewstep.training.fate import shared_fate
from fewstep.training.loop import Loop, sampling_role
from fewstep.training.monitor import Monitor
from fewstep.training.run_folder import check_folder, write_config

#: The student's weights, in the run's folder.
STUDENT = "student.safetensors"


class ModuleRecipe:
    """How a bare network is called; see the module."""

    component = "network"
    times: tuple[Any, ...] = ()
    #: Every entry of a sample is the network's to read, and its answer is looked at everywhere.
    unread = None

    def call(
        self, network: nn.Module, x: Tensor, timestep: Tensor, conditioning: Conditioning, *, continuous: bool = False
    ) -> Tensor:
        """The network's answer (B, ...)."""
        answer: Tensor = network(x, timestep.to(x.dtype), **conditioning.arguments())
        if answer.shape != x.shape:
            raise UserError(f"the network answers {tuple(answer.shape)} to samples {tuple(x.shape)}; both must agree")
        return answer


@dataclass(frozen=True)
class ModuleSamples:
    """What a bare network is trained on.

    Attributes:
        x0: N clean samples (N, ...), in memory.
        conditions: what the network is told of each, (N, ...) by the name of its argument.
        device: where batches are put.
        negative: what guidance leads away from, of one sample (1, ...) by name: the sample's own condition but for what
            it names; None where it is not guided.
    """

    x0: Tensor
    conditions: Mapping[str, Tensor]
    device: torch.device
    negative: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        for name, value in self.conditions.items():
            if len(value) != len(self.x0):
                raise UserError(f"the condition {name} has {len(value)} rows for {len(self.x0)} samples")
        if not len(self.x0):
            raise UserError("there are no samples to train on")

    def batch(self, seed: int, positions: Sequence[int]) -> Real:
        """Those at these places of an endless keyed order."""
        rows = torch.tensor([keyed_order(seed, "samples", len(self.x0), place) for place in positions])
        told = {name: value[rows].to(self.device) for name, value in self.conditions.items()}
        others: list[Conditioning] = []
        if self.negative is not None:
            less = {name: value[[0] * len(rows)].to(self.device) for name, value in self.negative.items()}
            others = [condition({**told, **less}, len(rows))]
        return Real(self.x0[rows].to(self.device), condition(told, len(rows), others))


@dataclass(frozen=True)
class _Conditions:
    """Those of the samples alone."""

    samples: ModuleSamples

    def batch(self, seed: int, positions: Sequence[int]) -> Any:
        return self.samples.batch(seed, positions).conditioning


class ModuleBench:
    """What a method is prepared at where there is no pipeline: roles, guidance and a sampler, and nothing besides.

    Args:
        config: of the run.
        network: the teacher's.
        samples: that are trained on.
        schedule: of its times.
        prediction_type: of its answers.
    """

    shift = 1.0

    def __init__(
        self,
        config: RunConfig,
        network: nn.Module,
        samples: ModuleSamples,
        schedule: NoiseSchedule,
        prediction_type: str,
    ) -> None:
        self.config, self.network, self.samples, self.schedule = config, network, samples, schedule
        self.prediction_type = prediction_type
        self.further = 0 if samples.negative is None else 1
        self.guidance_scale = 1.0 if config.guidance_scale is None else config.guidance_scale
        self.sampler = module_sampler(schedule, config.steps, "ode" if config.renoise == "auto" else config.renoise)

    def __getattr__(self, name: str) -> Any:
        raise UserError(f"this method asks for the {name} of a pipeline, which a bare network lacks; take mdt_dist")

    def make_roles(self, *names: str) -> dict[str, Role]:
        """The frozen teacher, the roles ``names``, and ``ema`` where the run has one; all full copies."""
        names = ("teacher", *names, *(["ema"] if self.config.ema_decay else []))
        roles: dict[str, Role] = {name: self._role(name, name not in ("teacher", "target", "ema")) for name in names}
        follow(roles)
        return roles

    def make_differentiated_roles(self, *names: str, exact: bool) -> dict[str, Role]:
        """As :meth:`make_roles`, with a student whose answers have a forward derivative if ``exact``.

        Raises:
            UserError: they have none.
        """
        roles = self.make_roles("student", *names)
        if exact:
            some, own = self.samples.batch(0, [0, 0]), roles["student"].single.denoiser
            t = self.schedule.snap(torch.full((2,), 0.5, dtype=torch.float64, device=some.x0.device))
            advice = "take derivative='backward'"
            refuse_underivable(lambda t: own.raw(some.x0, t, some.conditioning), t, own.network, advice=advice)
        return roles

    def guided(self, role: Role, guidance_scale: float | None = None) -> GuidedDenoiser:
        """A role under guidance, by default the run's."""
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        return GuidedDenoiser(role, scale, self.further, joint=not self.config.sequential_guidance)

    def describe(self, **what: Any) -> None:
        """Nothing: there is no card."""

    def _role(self, name: str, trainable: bool) -> NetworkRole:
        network = copy.deepcopy(self.network).to(self.samples.device).eval().requires_grad_(trainable)
        half = torch.bfloat16 if self.config.mixed_precision == "bf16" else None
        recipe: Any = ModuleRecipe()  # all of a recipe that a denoiser asks for
        return NetworkRole(name, NetworkDenoiser(network, recipe, self.schedule, self.prediction_type, half))


def distill_module(
    network: nn.Module,
    x0: Tensor,
    conditions: Mapping[str, Tensor] | None = None,
    *,
    out: str | Path,
    method: str = "mdt_dist",
    negative: Mapping[str, Tensor] | None = None,
    schedule: NoiseSchedule | None = None,
    prediction_type: str = "flow",
    **settings: Any,
) -> nn.Module:
    """Distil a bare network; see the module for how it is called.

    Args:
        network: the teacher; it is not changed.
        x0: N clean samples (N, ...).
        conditions: what the network is told of each, (N, ...) by name.
        out: folder for the run: config.yaml, metrics.jsonl, checkpoints and ``student.safetensors``, its weights.
        method: of ``fewstep.trainers``; one that asks for no more than roles, guidance and a sampler.
        negative: the condition that guidance leads away from, of one sample (1, ...), by name; of names that it
            lacks (a mask, coordinates) each sample keeps its own.
        schedule: of its times; default flow matching.
        prediction_type: of its answers; default noise - x0.
        **settings: fields of the method's configuration.

    Returns:
        The student, a copy of the network with other weights: the average where ``ema_decay`` asks for one.

    Raises:
        UserError: for everything that a user can mend.
    """
    try:
        config = method_class(method).Config(teacher=type(network).__name__, out=str(out), data="tensors", **settings)
    except TypeError as error:
        raise UserError(f"{method} has no such setting: {error}") from error
    config = config.resolved()
    for name in ("lora_rank", "gradient_checkpointing", "compile", "eval_steps", "init", "export_dtype", "push_to_hub"):
        if getattr(config, name):
            raise UserError(f"{name} belongs to pipelines, and the teacher is a bare network: leave it out")
    if config.sharding != "none":
        raise UserError("sharding belongs to pipelines, and the teacher is a bare network: leave it out")
    accelerator = join_launch(config.cpu, log_with=None, project_dir=config.out)
    with nothing_left(Path(out)), shared_fate(accelerator, Interrupted):
        folder, main = Path(out), accelerator.is_main_process
        resuming = check_folder(folder, method, config, in_memory=True)
        accelerator.wait_for_everyone()
        samples = ModuleSamples(x0, dict(conditions or {}), accelerator.device, negative)
        bench = ModuleBench(config, network, samples, schedule or FlowSchedule(), prediction_type)
        prepared = method_class(method).prepare(config, bench)
        if main:
            write_config(folder, method, config)
        accelerator.wait_for_everyone()
        processes = Processes(accelerator.process_index, accelerator.num_processes)
        loop = Loop(
            prepared,
            method,
            config,
            batches=Batches(_Conditions(samples), tuple(x0.shape[1:]), accelerator.device, samples),
            processes=processes,
            monitor=Monitor(folder, config.max_steps, accelerator),
            on_samples=lambda _step, _pause: {},
            best=Best(folder, None, 0, processes),
        )
        if resuming:
            loop.resume(find_latest(folder / "checkpoints"))
        try:
            loop.run()
        finally:
            loop.monitor.close()
        student = sampling_role(prepared.roles).single.denoiser.network
        if main:
            weights = {name: value.detach().cpu().contiguous() for name, value in student.state_dict().items()}
            write_durably(folder / STUDENT, lambda path: save_file(weights, path))
        accelerator.wait_for_everyone()
    return student.requires_grad_(False)


@torch.no_grad()
def sample_module(
    network: nn.Module,
    noise: Tensor,
    conditions: Mapping[str, Tensor] | None = None,
    *,
    steps: int,
    renoise: str = "ode",
    step_noise: Sequence[Tensor] = (),
    schedule: NoiseSchedule | None = None,
    prediction_type: str = "flow",
) -> Tensor:
    """Samples (B, ...) of a bare network from unit noise (B, ...), in even steps along its velocity or afresh.

    Args:
        network: of a student or, in more steps, of a teacher.
        noise: (B, ...).
        conditions: (B, ...) by name.
        steps: network calls.
        renoise: ode or fresh.
        step_noise: for ``fresh``, unit noise (B, ...) of the second step and on.
        schedule: as in :func:`distill_module`.
        prediction_type: the same.
    """
    schedule, recipe = schedule or FlowSchedule(), ModuleRecipe()
    denoiser = NetworkDenoiser(network, recipe, schedule, prediction_type)  # type: ignore[arg-type]  # as in _role
    sampler = module_sampler(schedule, steps, renoise)
    told = condition(dict(conditions or {}), len(noise))
    return rollout(denoiser, sampler, noise, told, lambda step: step_noise[step - 1])


def module_sampler(schedule: NoiseSchedule, steps: int, renoise: str) -> Sampler:
    """Even steps from noise."""
    return Sampler(schedule, tuple(even_grid(steps).tolist()), renoise, schedule.initial_scale())


def condition(values: Mapping[str, Tensor], count: int, others: Sequence[Conditioning] = ()) -> Conditioning:
    """Tensors (B, ...) by the names of a network's arguments, and what it is told for the samples' further answers."""
    return Conditioning({name: Leaf(value, rows=1) for name, value in values.items()}, count, others)
