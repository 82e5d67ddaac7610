"""One training step without a run around it, to weigh on fake tensors (``fewstep plan``) or to measure on real ones.

The method, its roles, its turns and the updates are those of a run. What a run does beside them is left out: prompts,
files, proofs, and the trial export, so that the student's grid is an even one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fewstep.conditioning.conditioning import Conditioning
from fewstep.config.run import RunConfig
from fewstep.data.batch import Batch, Pairs, Real
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.phases import Phase
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.timesteps import even_grid
from fewstep.export.flow_map import refuse_no_flow_map
from fewstep.export.phased import phased_recording
from fewstep.export.plan import StudentPlan
from fewstep.networks.features import FeatureTap, likely_tap
from fewstep.networks.guidance_embedding import likely_guidance_embedding
from fewstep.networks.make_roles import RoleSettings, make_roles
from fewstep.networks.roles import Role, update_average
from fewstep.networks.second_time import attach_second_time
from fewstep.networks.time_embedders import likely_time_embedders
from fewstep.programs.distillation import Distillation
from fewstep.programs.methods import method_class
from fewstep.programs.teacher import guidance_of
from fewstep.recording import Recording
from fewstep.recording.pipeline import find_scheduler
from fewstep.training.method import Method, Turn

#: Makes the context in which networks are made and run: that of fake tensors, a device, or none.
World = Callable[[], AbstractContextManager[Any]]


class DryRun(Distillation):
    """What a method is prepared with, and batches for its steps.

    Args:
        config: of the run.
        method: name of the method.
        pipeline: the teacher, weightless or real.
        recording: of that pipeline.
        device: of the roles.
        world: that of fake tensors for a plan. What a method works out with numbers of its own, it works out on real
            ones.
    """

    def __init__(
        self,
        config: RunConfig,
        method: str,
        pipeline: DiffusionPipeline,
        recording: Recording,
        device: torch.device | str = "cpu",
        world: World = nullcontext,
    ) -> None:
        self.config, self.method, self.pipeline, self.recording = config, method, pipeline, recording
        self.student_recording, self.pairs, self.real = recording, None, None
        self.device, self.world = torch.device(device), world
        #: How often the (guided) teacher is evaluated, in samples, for pairs that the run makes.
        self.pair_evaluations = 0
        self.plan = _even_plan(config, recording)
        self.shift = self.plan.shift
        self.sampler = Sampler(recording.schedule, self.plan.grid, self.plan.renoise, self.plan.initial_scale)
        self.guidance_scale = guidance_of(config, recording)
        # An input for the guidance that a run would add to the network weighs next to nothing, and is left out.
        told = config.embeds_guidance and recording.embedded
        self.guidance_embedding = likely_guidance_embedding(recording, config.guidance_min) if told else None
        negative = recording.negative()
        self.negative = None if negative is None else negative.to(device=self.device)
        self._conditions = self._conditioning(config.batch_size)
        self._real = None
        if config.data is not None:
            x0 = torch.zeros(config.batch_size, *recording.sample_shape, device=self.device)
            self._real = Real(x0, self._conditions)

    def prepare(self) -> Method:
        """The method with its roles."""
        return method_class(self.method).prepare(self.config, self)

    def make_roles(self, *names: str) -> dict[str, Role]:
        """As in a run."""
        return self._roles(names)

    def make_phased_roles(self, phases: Sequence[Phase], *names: str) -> dict[str, Role]:
        """As in a run; how the student is shipped is not looked at."""
        return self._roles(("student", *names), phased_recording(self.recording, phases))

    def make_flow_map_roles(self, *, differentiated: bool) -> dict[str, Role]:
        """As in a run; where the network is told its second time is not observed, but known by names."""
        refuse_no_flow_map(self.recording)
        roles = self.make_roles("student")
        sites = likely_time_embedders(self.recording.network)
        for name in roles.keys() - {"teacher"}:
            checkpointing = self.config.gradient_checkpointing and name == "student"
            with self.world():
                attach_second_time(roles[name], self.recording.component, sites, checkpointing, self.config.seed)
        return roles

    def add_head(self, role: Role) -> FeatureTap:
        """As in a run."""
        with self.world():
            return super().add_head(role)

    def run_pairs(self) -> _NoPairs:
        """Pairs are made before the training; what they would cost is kept as ``pair_evaluations``."""
        return _NoPairs(self)

    def initialize(self, roles: dict[str, Role]) -> None:
        """Nothing: other weights take no other memory."""

    def batch(self, step: int, draws: type[Draws] | None = None) -> Batch:
        """The micro-batch of a step: the recording's own prompt or label for every sample, grey images where asked.

        Args:
            step: of the run.
            draws: the class of its draws; by default they are such that no step costs more.
        """
        size, shape = self.config.batch_size, self.recording.sample_shape
        drawn = (draws or _LongestDraws)(self.config.seed, step, range(size), self.device)
        pairs = None
        if self.pairs is not None:
            noise = torch.zeros(size, *shape, device=self.device)
            pairs = Pairs(torch.zeros_like(noise), noise, self._conditions)
        return Batch(size, shape, self._conditions, drawn, self._real, logging=False, pairs=pairs)

    def _roles(self, names: tuple[str, ...], student: Recording | None = None) -> dict[str, Role]:
        with self.world():
            settings = RoleSettings.of(self.config)
            return make_roles(settings, self.recording, names, self.device, student, _always_the_first)

    def _tapped(self, role: Role) -> tuple[FeatureTap, Tensor]:
        """As in a run, but the tap's place alone is looked up: which tokens are the image is not observed."""
        x = torch.zeros(2, *self.recording.sample_shape, device=self.device)
        t = torch.full((2,), 0.5, dtype=torch.float64, device=self.device)
        denoiser = next(iter(role.experts.values())).denoiser
        tap = likely_tap(denoiser.network)
        with self.world(), torch.no_grad():
            return tap, denoiser.features(x, t, self._conditioning(2), tap)

    def _conditioning(self, size: int) -> Conditioning:
        return Conditioning(self.recording.marked, 1).select([0] * size).to(device=self.device)

    def _say(self, line: str) -> None:
        pass


def _even_plan(config: RunConfig, recording: Recording) -> StudentPlan:
    """A student on an even grid, as the trial export of a run would find it or nearly so."""
    grid = tuple(even_grid(config.steps).tolist())
    return StudentPlan(
        scheduler=getattr(recording.pipeline, find_scheduler(recording.pipeline)),
        renoise="fresh" if config.renoise == "fresh" else "ode",
        steps=config.steps,
        timesteps=grid,
        grid=grid,
        counts=(config.steps,),
        grids={config.steps: grid},
        call={},
        initial_scale=recording.schedule.initial_scale(),
        noise_follows=None,
        prediction_type=recording.prediction_type,
        shift=config.shift or 1.0,
        note="",
    )


class _LongestDraws(Draws):
    """Draws whose shared integer, the step at which a student's walk ends, is the largest: no walk costs more.

    What the host decides by is drawn for real, also where tensors are fake.
    """

    def shared_integer(self, name: str, low: int, high: int) -> int:
        self._claim(name)
        return high - 1

    def coins(self, name: str, probability: float) -> list[bool]:
        with unset_fake_temporarily():
            return super().coins(name, probability)


class _NoPairs:
    """In the place of a run's pairs: nothing is made but noted, and every batch holds zeros."""

    def __init__(self, dry_run: DryRun) -> None:
        self._dry_run = dry_run

    def make(self, _teacher: Role, num: int, steps: int, solver: str, real: Any = None) -> None:
        self._dry_run.pair_evaluations += num * steps * (2 if solver == "heun" else 1)

    def stream(self, *_folders: Any) -> _NoPairs:
        return self


def _always_the_first(t: Tensor) -> list[int]:
    """Where several networks share the time: all samples go to the first, as only the times' values could tell."""
    return [0] * len(t)


def backward(method: Method, turn: Turn) -> None:
    """The gradients of a turn's role, as the loop takes them."""
    tensors = [tensor for tensor, _ in turn.backward]
    gradients = [torch.ones_like(t) if g is None else g.to(t.dtype) for t, g in turn.backward]
    torch.autograd.backward(tensors, gradients, inputs=method.roles[turn.role].parameters())


def move_averages(method: Method, turn: Turn, decay: float) -> None:
    """What the loop does after a student's update."""
    if turn.role == "student" and "ema" in method.roles:
        update_average(method.roles["ema"], method.roles["student"], decay)
