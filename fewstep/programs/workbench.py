"""The workbench of a run: an open teacher, what its student will be, and what there is to train on.

A method is prepared at it (:class:`fewstep.training.method.Bench`). It writes no files and knows of no processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewstep.conditioning.ragged import AnyConditioning
from fewstep.config.run import RunConfig
from fewstep.data.batch import Batches, SizedBatches
from fewstep.data.pair_stream import PairStream
from fewstep.data.pairs import refuse_real_of_sizes
from fewstep.data.partition import part_of
from fewstep.data.real import RealSamples
from fewstep.data.shard_index import INDEX_FOLDER
from fewstep.data.targets import real_samples
from fewstep.diffusion.draws import OBSERVATION_STEP, RESPONSE_STEP, Draws
from fewstep.diffusion.phases import Phase, describe
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.scales import GuidanceScale
from fewstep.export.any_flow import takes_two_times
from fewstep.export.flow_map import refuse_no_flow_map
from fewstep.export.student import Student
from fewstep.networks.all_times import ask_at_all_times, refuse_jumping, refuse_undifferentiated
from fewstep.networks.features import FeatureTap, tapped
from fewstep.networks.flow_map import SECOND_TIME
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.guidance_embedding import find_guidance_embedding, with_guidance_embedding
from fewstep.networks.heads import LevelHeads, make_head
from fewstep.networks.image_features import image_features_of
from fewstep.networks.make_roles import RoleSettings, make_roles
from fewstep.networks.perceptual import images_of, lpips_of
from fewstep.networks.roles import Role
from fewstep.networks.second_time import add_second_time
from fewstep.networks.smaller import refuse_unanswering, resized_recording
from fewstep.networks.speed_up import SPEED_UP, plugged_roles, refuse_several_negatives, refuse_unlike
from fewstep.programs.student_plan import planned
from fewstep.programs.teacher import (
    Teacher,
    TeacherSettings,
    conditions_of,
    open_teacher,
    refuse_guided_alike,
    refuse_quantized,
)
from fewstep.recording import Recording
from fewstep.training.rewards import Reward


def _silent(_line: str) -> None:
    """Tell nobody."""


class Workbench:
    """What a method is prepared at in a run.

    Args:
        config: of the run.
        teacher: of the run.
        device: of the roles.
        say: told in one line what a user may want to know.
        progress: show how far encoding is.

    Attributes:
        recording: that roles start from: the teacher's, with room for its guidance where the run embeds that.
        student: what it will be; the method's wishes make it another one.
        conditions: to generate for.
        real: real samples; None in a run without.

    Raises:
        UserError: for everything that a user can mend.
    """

    def __init__(
        self,
        config: RunConfig,
        teacher: Teacher,
        device: torch.device,
        say: Callable[[str], None] = _silent,
        progress: bool = False,
    ) -> None:
        given, config = config, config.resolved()
        self.config, self.teacher, self.device, self.say = config, teacher, device, say
        self.guidance_scale = teacher.guidance_scale
        self.recording: Recording = teacher.recording
        self.guidance_embedding = None
        if config.embedded_guidance is not None:
            self.recording = with_guidance_embedding(
                teacher.recording, self.guidance_scale, trained=not config.lora_rank
            )
            heeded = self.recording is teacher.recording
            self.guidance_embedding = find_guidance_embedding(self.recording, heeded=heeded)
        plan = planned(given, self.recording)
        say(plan.note)
        self.student = Student.of(self.recording, plan, teacher.lora)
        self.conditions = conditions_of(config, teacher, device, progress=progress, draws=config.draws)
        for line in self.conditions.notes:
            say(line)
        every, part = self.conditions, None
        if config.partition_wanted is not None:
            part = part_of(config.partition_wanted, every)
            self.conditions = every.only(part.rows)
            self.describe(part=part.about())
            say(part.note)
        if texts := self.conditions.texts():
            self.describe(example=texts[0])
        draws = Draws(config.seed, RESPONSE_STEP, range(2), device)
        refuse_guided_alike(self.recording, self.guidance_scale, self.conditions, draws, self.with_default_guidance)
        self.real: RealSamples | None = None
        if config.data is not None:
            what = (config.data, config.data_text, Path(config.out) / INDEX_FOLDER, teacher.items)
            self.real = real_samples(*what, teacher.recording, every, device, workers=config.data_workers)
            say(self.real.note)
            if part is not None:
                self.real = self.real.only(every, part.rows, self.conditions)

    @property
    def scheduler(self) -> Any:
        """That the student is shipped with."""
        return self.student.plan.scheduler

    @property
    def grids(self) -> Mapping[int, tuple[float, ...]]:
        """The student's times by step count."""
        return self.student.plan.grids

    @property
    def shift(self) -> float:
        """Of a flow student's grid."""
        return self.student.plan.shift

    @property
    def further(self) -> int:
        """How many further answers each sample has that guidance may lead away from; 0 without such guidance."""
        return self.conditions.further

    @property
    def sampler(self) -> Sampler:
        """How the student moves."""
        plan = self.student.plan
        return Sampler(self.recording.schedule, plan.grid, plan.renoise, plan.initial_scale, plan.gamma)

    def make_roles(self, *names: str) -> dict[str, Role]:
        """The frozen teacher, the roles ``names``, and ``ema`` where the run has one."""
        changes = self.config.resized_network
        if changes is None:
            own = self.student.recording
            return make_roles(RoleSettings.of(self.config), self.recording, names, self.device, own)
        resized = resized_recording(self.student.recording, changes, self.config.seed)
        refuse_unanswering(resized, *self.two_samples())
        self.student = self.student.resized(resized)
        return make_roles(RoleSettings.of(self.config), self.recording, names, self.device, resized)

    def make_phased_roles(self, phases: Sequence[Phase], *names: str) -> dict[str, Role]:
        """The frozen teacher, a student (and ``ema``) with an expert for each phase, and the roles ``names``."""
        self.say(describe(phases, self.recording.schedule))
        self.student = self.student.phased(phases)
        own = self.student.recording
        return make_roles(RoleSettings.of(self.config), self.recording, ("student", *names), self.device, own)

    def make_flow_map_roles(self, *names: str, differentiated: bool, told: str = "next") -> dict[str, Role]:
        """The frozen teacher, a student (and ``ema``) that is told where its steps end, and the roles ``names``."""
        refuse_no_flow_map(self.recording)
        roles = self.make_roles("student", *names)
        conditioning = self.with_default_guidance(self.conditions.select([0, 0]))
        stock = told == "next" and takes_two_times(self.recording, self.student.plan)
        how = (differentiated, self.config.gradient_checkpointing, self.config.seed, stock, told)
        add_second_time(roles, self.recording.component, self._two(), conditioning, *how)
        self.student = self.student.flow_map(roles["student"].added[SECOND_TIME])
        return roles

    def make_plugged_roles(self) -> dict[str, Role]:
        """The frozen teacher, and a student (and ``ema``) that is its network under an adapter."""
        asked = self.two_samples()
        roles = plugged_roles(RoleSettings.of(self.config), self.recording, asked, self.device)
        refuse_several_negatives(asked[2], self.two_samples(-1)[2])
        refuse_unlike(roles, asked)
        self.student = self.student.plugged(roles["student"].added[SPEED_UP])
        return roles

    def make_differentiated_roles(self, *names: str, exact: bool) -> dict[str, Role]:
        """The frozen teacher, a student (and ``ema``) that is asked at all times, and the trainable roles ``names``.

        Raises:
            UserError: it knows no times but those of its table, or ``exact`` without a forward derivative.
        """
        refuse_undifferentiated(self.recording, exact)
        roles = self.make_roles("student", *names)
        ask_at_all_times(roles["student"])
        refuse_jumping(roles, self._two(), self.with_default_guidance(self.conditions.select([0, 0])), exact)
        return roles

    def guided(self, role: Role, guidance_scale: GuidanceScale | None = None) -> GuidedDenoiser:
        """A role under guidance, by default the run's, which is the teacher's."""
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        joint = not self.config.sequential_guidance
        rescaling = self.recording.guidance.rescaling
        return GuidedDenoiser(role, scale, self.further, joint, self.teacher.later_scales, rescaling)

    def tap(self, role: Role) -> FeatureTap:
        """Where a role's features are tapped, the same place in each of several experts."""
        return self._tapped(role)[0]

    def add_head(self, role: Role) -> FeatureTap:
        """Give a role a GAN head on its own features, and say where they are tapped."""
        tap, features = self._tapped(role)
        role.add("head", make_head(features, self.config.seed))
        return tap

    def add_image_heads(self, role: Role, extractor: str | None = None) -> Callable[[Tensor], list[Tensor]]:
        """Give a role GAN heads on features of the images that samples show, and return the way from x0 to those."""
        features = image_features_of(self.recording, extractor, self.device)
        with torch.no_grad():
            seen = features(self._two())
        role.add("heads", LevelHeads(seen, self.config.seed))
        self.say(f"the discriminator's heads see {features.about}: {', '.join(str(list(f.shape[1:])) for f in seen)}")
        return features

    def add_module(self, role: Role, name: str, make: Callable[[], nn.Module]) -> None:
        """Give a role one more module, which is trained and kept with it, with the same weights on every process."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            role.add(name, make().to(self.device))

    def pictures(self) -> Callable[[Tensor], Tensor]:
        """The way from x0 (B, ...) to pictures (B, C, H, W) in [0, 1]; with --gradient_checkpointing decoded twice.

        Raises:
            UserError: the teacher makes videos.
        """
        shown = images_of(self.recording, "--reward looks at")
        if not self.config.gradient_checkpointing:
            return shown

        def recomputed(x0: Tensor) -> Tensor:
            made: Tensor = checkpoint(shown, x0, use_reentrant=False)
            return made

        return recomputed

    def open_reward(self, opened: Callable[[torch.device], Reward]) -> Reward | None:
        """A reward of pictures, on the run's device."""
        return opened(self.device)

    def perceptual_distance(self) -> Callable[[Tensor, Tensor], Tensor]:
        """LPIPS (B,) between the images that two batches x0 (B, ...) stand for.

        Raises:
            UserError: it cannot be had, or the teacher makes videos.
        """
        return lpips_of(self.recording, self.device)

    def describe(self, **what: Any) -> None:
        """Put on the student's card what the method knows of it: fields of :class:`fewstep.export.StudentPlan`."""
        self.student = self.student.described(**what)

    def with_default_guidance(self, conditioning: AnyConditioning) -> AnyConditioning:
        """The same conditioning where the network is told its guidance by default, else as it is."""
        told = self.guidance_embedding
        if told is None:
            return conditioning
        return told.tell(conditioning, torch.full((conditioning.batch_size,), told.default, device=self.device))

    def two_samples(self, row: int = 0) -> tuple[Tensor, Tensor, AnyConditioning]:
        """What a role may be asked with: two samples of noise (2, ...), times (2,), and a row of the conditions twice.

        A negative row counts from the end.
        """
        row %= len(self.conditions)
        conditioning = self.with_default_guidance(self.conditions.select([row, row]))
        return self._two(row), torch.full((2,), 0.5, dtype=torch.float64, device=self.device), conditioning

    def batches(self, pairs: PairStream | None = None) -> Batches | SizedBatches:
        """What the run trains on; real samples that were inverted come as ``pairs`` alone."""
        wanted = self.config.pairs_wanted
        real = None if wanted is not None and wanted.invert_real else self.real
        announce = None if real is None else real.announce
        sizes = self.conditions.sizes()
        if len(sizes) == 1:
            asked = self.conditions.asked
            return Batches(self.conditions, sizes[0][0], self.device, real, pairs, announce, asked)
        each = []
        for shape, rows in sizes:
            part = self.conditions.only(rows)
            shown = None if real is None else real.only(self.conditions, rows, part)
            announce = None if shown is None else shown.announce
            own = None if pairs is None else pairs.only(rows, part)
            each.append(Batches(part, shape, self.device, shown, own, announce, part.asked))
        return SizedBatches(tuple(each), tuple(len(rows) for _, rows in sizes), self.config.seed)

    def _tapped(self, role: Role) -> tuple[FeatureTap, Tensor]:
        """Where a role's features are tapped, and those of two samples of noise."""
        t, shown = torch.full((2,), 0.5, dtype=torch.float64, device=self.device), self.conditions.of_one_size()
        return tapped([expert.denoiser for expert in role.experts.values()], self._two(), t, shown)

    def _two(self, row: int = 0) -> Tensor:
        """Two samples of noise, of the shape that a row's samples have, for looking at what networks do with them."""
        draws = Draws(self.config.seed, OBSERVATION_STEP, range(2), self.device)
        return draws.normal("tap", self.conditions.shape(row))


def open_workbench(
    config: RunConfig,
    device: torch.device | str,
    pipeline: DiffusionPipeline | None = None,
    say: Callable[[str], None] = _silent,
    progress: bool = False,
    items: Sequence[Mapping[str, Any]] | None = None,
) -> Workbench:
    """Open the teacher of a run, and make the workbench.

    Args:
        config: of the run.
        device: of the roles.
        pipeline: the teacher's, where it is in memory already.
        say: told in one line what a user may want to know.
        progress: show how far encoding is.
        items: that are in memory, in the place of those that the settings name.

    Raises:
        UserError: and its subclasses, for everything that a user can mend.
    """
    settings = TeacherSettings.of(config)
    settings = settings if items is None else replace(settings, items=items)
    teacher = open_teacher(settings, device, pipeline, progress=progress)
    refuse_quantized(config, teacher)
    if (wanted := config.resolved().pairs_wanted) is not None and wanted.of_real:
        refuse_real_of_sizes(teacher.recording)
    teacher.refuse_next_time("which no method here can train yet")
    return Workbench(config, teacher, torch.device(device), say, progress)
