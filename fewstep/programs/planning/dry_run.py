"""One training step without a run around it, to weigh on fake tensors (``fewstep plan``) or to measure on real ones.

The method, its roles, its turns and the updates are those of a run. What a run does beside them is left out: prompts,
files, proofs, and the trial export, so that the student's grid is an even one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_leaves

from fewstep.conditioning.conditioning import Conditioning
from fewstep.config.run import RunConfig
from fewstep.data.batch import Batch, Pairs, Real
from fewstep.data.pair_stream import numbers_used
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.phases import Phase
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.scales import GuidanceScale
from fewstep.diffusion.timesteps import even_grid
from fewstep.export.any_flow import takes_two_times
from fewstep.export.flow_map import refuse_no_flow_map
from fewstep.export.phased import phased_recording
from fewstep.networks.all_times import ask_at_all_times, refuse_undifferentiated
from fewstep.networks.features import FeatureTap, likely_tap
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.guidance_embedding import likely_guidance_embedding
from fewstep.networks.heads import LevelHeads, make_head
from fewstep.networks.make_roles import RoleSettings, make_roles
from fewstep.networks.roles import FOLLOWERS, Role, update_average
from fewstep.networks.second_time import attach_second_time
from fewstep.networks.smaller import resized_recording
from fewstep.networks.speed_up import plugged_roles
from fewstep.networks.time_embedders import likely_time_embedders
from fewstep.programs.methods import method_class
from fewstep.programs.teacher import TeacherSettings, guidance_of
from fewstep.recording import Recording
from fewstep.recording.pipeline import find_scheduler
from fewstep.training.method import Method, Turn
from fewstep.training.rewards import Reward

#: Makes the context in which networks are made and run: that of fake tensors, a device, or none.
World = Callable[[], AbstractContextManager[Any]]


class DryRun:
    """What a method is prepared at, a :class:`fewstep.training.method.Bench`, and batches for its steps.

    Args:
        config: of the run.
        method: name of the method.
        recording: of the teacher's pipeline, weightless or real.
        device: of the roles.
        world: that of fake tensors for a plan. What a method works out with numbers of its own, it works out on real
            ones.
        roles: what they are; by default as in the run.
        told: what the network is told of a sample, with its further answers; by default what it was in the recording.
    """

    def __init__(
        self,
        config: RunConfig,
        method: str,
        recording: Recording,
        device: torch.device | str = "cpu",
        world: World = nullcontext,
        roles: RoleSettings | None = None,
        told: Conditioning | None = None,
    ) -> None:
        config = config.resolved()
        self.config, self.method, self.recording = config, method, recording
        self.device, self.world = torch.device(device), world
        self.roles = RoleSettings.of(config) if roles is None else roles
        self.scheduler = getattr(recording.pipeline, find_scheduler(recording.pipeline))
        self.shift = config.shift or 1.0
        grid = tuple(even_grid(config.steps).tolist())
        self.grids = {config.steps: grid}
        renoise = "ode" if config.renoise == "auto" else config.renoise
        scale, gamma = recording.schedule.initial_scale(), config.walk_gamma or 0.0
        self.sampler = Sampler(recording.schedule, grid, renoise, scale, gamma)
        self.guidance_scale = guidance_of(TeacherSettings.of(config), recording)
        # An input for the guidance that a run would add to the network weighs next to nothing, and is left out.
        scales = config.embedded_guidance if recording.embedded else None
        self.guidance_embedding = None if scales is None else likely_guidance_embedding(recording, scales[0])
        self.further = recording.further
        self._told = told
        self._conditions = self._conditioning(config.batch_size)

    def prepare(self) -> Method:
        """The method with its roles."""
        return method_class(self.method).prepare(self.config, self)

    @property
    def pair_evaluations(self) -> int:
        """How often the (guided) teacher is evaluated, in samples, for pairs that the run makes before its training."""
        config, wanted = self.config, self.config.pairs_wanted
        if wanted is None:
            return 0
        positions = config.max_steps * config.batch_size * config.gradient_accumulation_steps
        made = [False] * (wanted.folder is None) + [True] * wanted.invert_real
        counts = [len(numbers_used(wanted, wanted.num, config.seed, positions, inverted=which)) for which in made]
        return sum(counts) * wanted.steps * (2 if wanted.solver == "heun" else 1)

    def make_roles(self, *names: str) -> dict[str, Role]:
        """As in a run."""
        changes = self.config.resized_network
        if changes is None or not hasattr(self.recording.network, "config"):  # a stand-in is of no size
            return self._roles(names)
        with self.world():
            resized = resized_recording(self.recording, changes, self.config.seed)
        return self._roles(names, resized)

    def make_phased_roles(self, phases: Sequence[Phase], *names: str) -> dict[str, Role]:
        """As in a run; how the student is shipped is not looked at."""
        return self._roles(("student", *names), phased_recording(self.recording, phases))

    def make_flow_map_roles(self, *names: str, differentiated: bool, told: str = "next") -> dict[str, Role]:
        """As in a run; where the network is told its second time is not observed, but known by names."""
        refuse_no_flow_map(self.recording)
        roles = self.make_roles("student", *names)
        sites = likely_time_embedders(self.recording.network)
        stock = told == "next" and takes_two_times(self.recording)
        for name in roles.keys() & {"student", *FOLLOWERS}:
            checkpointing = self.roles.gradient_checkpointing and name == "student"
            with self.world():
                how = (sites, checkpointing, self.config.seed, stock, told)
                attach_second_time(roles[name].single, self.recording.component, *how)
        return roles

    def make_plugged_roles(self) -> dict[str, Role]:
        """As in a run."""
        x = torch.zeros(2, *self.recording.sample_shape, device=self.device)
        t = torch.full((2,), 0.5, dtype=torch.float64, device=self.device)
        with self.world():
            asked = (x, t, self._conditioning(2))
            return plugged_roles(self.roles, self.recording, asked, self.device)

    def make_differentiated_roles(self, *names: str, exact: bool) -> dict[str, Role]:
        """As in a run; whether there is a derivative is not tried."""
        refuse_undifferentiated(self.recording, exact)
        roles = self.make_roles("student", *names)
        ask_at_all_times(roles["student"])
        return roles

    def guided(self, role: Role, guidance_scale: GuidanceScale | None = None) -> GuidedDenoiser:
        """As in a run."""
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        joint, report = not self.config.sequential_guidance, self.recording.guidance
        return GuidedDenoiser(role, scale, self.further, joint, report.later_scales, report.rescaling)

    def tap(self, role: Role) -> FeatureTap:
        """As in a run, but its place alone is looked up: which tokens are the image is not observed."""
        return likely_tap(next(iter(role.experts.values())).denoiser.network)

    def add_head(self, role: Role) -> FeatureTap:
        """As in a run."""
        x = torch.zeros(2, *self.recording.sample_shape, device=self.device)
        t = torch.full((2,), 0.5, dtype=torch.float64, device=self.device)
        tap, denoiser = self.tap(role), next(iter(role.experts.values())).denoiser
        with self.world():
            with torch.no_grad():
                features = denoiser.features(x, t, self._conditioning(2), tap)
            role.add("head", make_head(features, self.config.seed))
        return tap

    def add_image_heads(self, role: Role, extractor: str | None = None) -> Callable[[Tensor], list[Tensor]]:
        """Heads on a sample's numbers as tokens, in the place of features: no decoder or extractor is looked at."""

        def tokens(x0: Tensor) -> list[Tensor]:
            return [x0.flatten(1)[:, :, None]]

        with self.world():
            x = torch.zeros(2, *self.recording.sample_shape, device=self.device)
            role.add("heads", LevelHeads(tokens(x), self.config.seed))
        return tokens

    def add_module(self, role: Role, name: str, make: Callable[[], nn.Module]) -> None:
        """As in a run."""
        with self.world():
            role.add(name, make().to(self.device))

    def pictures(self) -> Callable[[Tensor], Tensor]:
        """The samples themselves: the decoder is not looked at."""
        return lambda x0: x0

    def open_reward(self, opened: Callable[[torch.device], Reward]) -> Reward | None:
        """None: nothing is rewarded here."""
        return None

    def perceptual_distance(self) -> Callable[[Tensor, Tensor], Tensor]:
        """In the place of LPIPS, whose network and the decoder before it are not looked at, a mean square."""
        return lambda a, b: (a - b).square().flatten(1).mean(1)

    def describe(self, **what: Any) -> None:
        """Nothing: no card is written."""

    def batch(self, step: int, draws: type[Draws] | None = None) -> Batch:
        """The micro-batch of a step: the recording's own prompt or label for every sample, grey images where asked.

        Args:
            step: of the run.
            draws: the class of its draws; by default they are such that no step costs more.
        """
        config, conditions = self.config, self._conditions
        size, shape, wanted = config.batch_size, self.recording.sample_shape, config.pairs_wanted
        drawn = (draws or LongestDraws)(config.seed, step, range(size), self.device)
        zeros = torch.zeros(size, *shape, device=self.device)
        pairs = Pairs(zeros, zeros.clone(), conditions) if wanted is not None else None
        given = config.data is not None and not (wanted is not None and wanted.invert_real)
        real = Real(zeros.clone(), conditions) if given else None
        return Batch(size, shape, conditions, drawn, real, logging=False, given_pairs=pairs)

    def told_tensors(self) -> list[Tensor]:
        """What the network is told of the samples of a micro-batch, for every answer."""
        answers = (self._conditions, *self._conditions.others)
        return [value for one in answers for value in tree_leaves(one.arguments()) if isinstance(value, Tensor)]

    def play(self, method: Method, step: int, draws: type[Draws] | None = None) -> None:
        """The turns of a step with their backward passes; nothing is updated, and gradients are dropped."""
        for turn in method.turns(step, self.batch(step, draws)):
            if isinstance(turn, Turn):
                backward(method, turn)
                for parameter in method.roles[turn.role].parameters():
                    parameter.grad = None

    def _roles(self, names: tuple[str, ...], student: Recording | None = None) -> dict[str, Role]:
        with self.world():
            return make_roles(self.roles, self.recording, names, self.device, student, _always_the_first)

    def _conditioning(self, size: int) -> Conditioning:
        if (one := self._told) is None:
            told, negative = Conditioning(self.recording.marked, 1), self.recording.negative()
            # Of items a further answer is of the positive one's size, or of nearly that.
            others = [told] * self.further if negative is None else [negative]
            one = Conditioning(told.tree, 1, others)
        return one.select([0] * size).to(device=self.device)


class LongestDraws(Draws):
    """Draws whose shared integer, the step at which a student's walk ends, is the largest: no walk costs more.

    What the host decides by is drawn for real, also where tensors are fake.
    """

    def shared_integer(self, name: str, low: int, high: int) -> int:
        self._claim(name)
        return high - 1

    def coins(self, name: str, probability: float) -> list[bool]:
        with unset_fake_temporarily():
            return super().coins(name, probability)

    def numbers(self, name: str) -> list[float]:
        with unset_fake_temporarily():
            return super().numbers(name)


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
