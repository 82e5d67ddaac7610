"""One distillation from a teacher to an exported student: what every method shares before and after its training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fewstep.conditioning.ragged import AnyConditioning
from fewstep.config.run import RunConfig, resolved
from fewstep.data.batch import PairSource
from fewstep.data.encoders import Encoders
from fewstep.data.images import read_images
from fewstep.data.real import RealSamples
from fewstep.diffusion.draws import OBSERVATION_STEP, RESPONSE_STEP, Draws
from fewstep.diffusion.intervals import TimedScale
from fewstep.diffusion.phases import Phase, describe
from fewstep.diffusion.rollout import Sampler
from fewstep.errors import UserError
from fewstep.export import export_lora, export_student, plan_student, publish, refuse_own_code, why_no_lora
from fewstep.export.flow_map import flow_map_recording, refuse_no_flow_map, whole_network
from fewstep.export.full_precision import in_full_precision
from fewstep.export.phased import moves_boundary, phased_plan, phased_recording
from fewstep.export.whole import check_counts
from fewstep.networks.features import FeatureTap, tapped
from fewstep.networks.flow_map import SECOND_TIME
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.guidance_embedding import find_guidance_embedding, with_guidance_embedding
from fewstep.networks.heads import make_head
from fewstep.networks.make_roles import RoleSettings, make_roles
from fewstep.networks.response import refuse_unresponsive
from fewstep.networks.roles import Role
from fewstep.networks.second_time import add_second_time
from fewstep.programs.methods import method_class
from fewstep.programs.teacher import conditions_of, guidance_of, refuse_quantized, teacher_call
from fewstep.recording import record
from fewstep.recording.pipeline import find_scheduler, is_quantized, name_of, with_parts
from fewstep.teachers.license import teacher_license
from fewstep.teachers.loading import load_run_teacher
from fewstep.teachers.lora import FusedLora, fuse_teacher_lora, with_own_weights
from fewstep.training.distributed import Processes, join_launch
from fewstep.training.initialization import initialize
from fewstep.training.loop import Loop, sampling_role
from fewstep.training.monitor import Monitor, trackers
from fewstep.training.previews import Previews
from fewstep.training.run_folder import check_folder, write_config

if TYPE_CHECKING:
    from fewstep.programs.pairs import RunPairs

logger = logging.getLogger("fewstep")

#: Settings that say something of a machine and nothing of a student; they are not published with it.
_PRIVATE = frozenset({"teacher", "teacher_lora", "out", "prompts", "cache", "pairs", "inverted_pairs", "data", "init"})
_PRIVATE |= {"push_to_hub", "hub_private", "resume", "cpu", "report_to"}


class Distillation:
    """A teacher, recorded and proven; a student's plan, walked; what to train on. Methods take their roles from here.

    Args:
        config: of the run.
        method: name of the method.
        pipeline: the teacher where it is in memory already, else it is loaded from ``config.teacher``.

    Raises:
        UserError: and its subclasses, for everything that a user can mend.
    """

    def __init__(self, config: RunConfig, method: str, pipeline: DiffusionPipeline | None = None) -> None:
        self.config, self.method = config, method
        self.out = Path(config.out)
        self.accelerator = join_launch(config.cpu, log_with=trackers(config.report_to), project_dir=config.out)
        self.device = self.accelerator.device
        self.resuming = check_folder(self.out, method, config)
        self.accelerator.wait_for_everyone()

        reload = partial(load_run_teacher, config) if pipeline is None else None
        self.pipeline = load_run_teacher(config) if pipeline is None else pipeline
        self.teacher_lora: FusedLora | None = None
        if config.teacher_lora is not None:
            self.pipeline = self.pipeline if pipeline is None else with_own_weights(pipeline)
            self.teacher_lora = fuse_teacher_lora(self.pipeline, config.teacher_lora)
            if self.teacher_lora.in_text:
                reload = None  # what lies in the teacher's folder is another text encoder
        self.pipeline.to(self.device)
        self.recording = record(self.pipeline, **teacher_call(config))
        refuse_quantized(config, self.recording, loaded=pipeline is None)
        self.recording.prove()
        if self.recording.recipe.needs_next:
            raise UserError("this teacher's network is told the next time too, which no method here can train yet")
        self.guidance_scale = guidance_of(config, self.recording)
        teacher, self.guidance_embedding = self.recording, None
        if config.embeds_guidance:
            self.recording = with_guidance_embedding(teacher, self.guidance_scale, trained=not config.lora_rank)
            self.guidance_embedding = find_guidance_embedding(self.recording, heeded=self.recording is teacher)
        #: Of the pipeline that the student will be: the teacher's own, unless it has other experts.
        self.student_recording = self.recording
        self.plan = plan_student(
            self.recording,
            config.steps,
            renoise=config.renoise,
            shift=config.shift,
            first_timestep=config.first_timestep,
            first_sigma=config.first_sigma,
            start=config.start,
        )
        self._say(self.plan.note)
        self.sampler = Sampler(self.recording.schedule, self.plan.grid, self.plan.renoise, self.plan.initial_scale)
        self.shift = self.plan.shift
        progress = self.accelerator.is_main_process
        self.conditions, negative = conditions_of(config, teacher, self.device, progress=progress)
        self._say(self.conditions.note)
        # Also where the teacher is not guided: a critic may be.
        self.negative = self.with_default_guidance(negative.to(device=self.device)) if negative is not None else None
        if self.negative is not None and self.guidance_scale != 1.0:
            draws = Draws(config.seed, RESPONSE_STEP, range(2), self.device)
            noise = draws.normal("listening", self.recording.sample_shape)
            heard = [
                self.with_default_guidance(self.conditions.select([row])) for row in range(min(2, len(self.conditions)))
            ]
            refuse_unresponsive(self.recording, self.negative, heard, noise)
        self.pairs: PairSource | None = None
        self.previews = Previews(config, self.recording, self.conditions, self.device, self.with_default_guidance)
        self._say(self.previews.note)
        self.real = None
        if config.data is not None:
            self.real = RealSamples(read_images(config.data), teacher, self.conditions, self.device)
        self.encoders = Encoders(self.recording, self.plan.call, reload)

    # --- what methods ask for -----------------------------------------------------------------------------------

    def make_roles(self, *names: str) -> dict[str, Role]:
        """The frozen teacher, the roles ``names``, and ``ema`` where the run has one."""
        return make_roles(RoleSettings.of(self.config), self.recording, names, self.device)

    def make_phased_roles(self, phases: Sequence[Phase], *names: str) -> dict[str, Role]:
        """The frozen teacher, a student (and ``ema``) with an expert for each phase, and the trainable roles ``names``.

        Raises:
            UserError: the phases do not fit this teacher, or its pipeline does not walk with as many networks.
        """
        self.student_recording = phased_recording(self.recording, phases)
        self.plan = phased_plan(self.plan, phases)
        self._say(describe(phases, self.recording.schedule))
        self._walk_student()
        return make_roles(
            RoleSettings.of(self.config), self.recording, ("student", *names), self.device, self.student_recording
        )

    def make_flow_map_roles(self, *, differentiated: bool) -> dict[str, Role]:
        """The frozen teacher, and a student (and ``ema``) that is told where its steps end.

        Raises:
            UserError: no network or pipeline could be told it, or ``differentiated`` without such a derivative.
        """
        refuse_no_flow_map(self.recording)
        roles = self.make_roles("student")
        x = Draws(self.config.seed, OBSERVATION_STEP, range(2), self.device).normal("tap", self.recording.sample_shape)
        conditioning = self.with_default_guidance(self.conditions.select([0, 0]))
        how = (differentiated, self.config.gradient_checkpointing, self.config.seed)
        add_second_time(roles, self.recording.component, x, conditioning, *how)
        self.student_recording = flow_map_recording(self.recording, roles["student"].added[SECOND_TIME])
        self._walk_student()
        return roles

    def guided(self, role: Role, guidance_scale: float | TimedScale | None = None) -> GuidedDenoiser:
        """A role under guidance, by default the run's, which is the teacher's."""
        return GuidedDenoiser(role, self.negative, self.guidance_scale if guidance_scale is None else guidance_scale)

    def tap(self, role: Role) -> FeatureTap:
        """Where a role's features are tapped, the same place in each of several experts."""
        return self._tapped(role)[0]

    def refuse_unguided(self, method: str) -> None:
        """Raise ``UserError`` where guidance is off, for a method that trains on what it changes.

        A teacher that answers the same with and without its condition was refused before.
        """
        if self.recording.guidance.embedded or self.guidance_scale == 1.0:
            raise UserError(
                f"{method} trains on the teacher's response to guidance, which is off here; set "
                "--guidance_scale above 1, or take a teacher that was not distilled for guidance"
            )

    def add_head(self, role: Role) -> FeatureTap:
        """Give a role a GAN head on its own features, and say where they are tapped.

        Several experts share one head, which sees features of the one whose time it is.
        """
        tap, features = self._tapped(role)
        role.add("head", make_head(features, self.config.seed))
        return tap

    def run_pairs(self) -> RunPairs:
        """What makes or opens the pairs of this run, to be asked for before the roles are made."""
        from fewstep.programs.pairs import RunPairs  # which stands on this module

        return RunPairs(self)

    def claim(self) -> None:
        """Make ``OUT`` this run's folder before it trains: what it then prepares there is gone on with after a kill."""
        if self.accelerator.is_main_process:
            write_config(self.out, self.method, self.config)
        self.accelerator.wait_for_everyone()

    def with_default_guidance(self, conditioning: AnyConditioning) -> AnyConditioning:
        """The same conditioning where the network is told its guidance by default, else as it is."""
        told = self.guidance_embedding
        if told is None:
            return conditioning
        return told.tell(conditioning, torch.full((conditioning.batch_size,), told.default, device=self.device))

    def describe(self, **what: Any) -> None:
        """Put on the student's card what the method knows of it: fields of :class:`fewstep.export.StudentPlan`."""
        self.plan = replace(self.plan, **what)

    def initialize(self, roles: dict[str, Role]) -> None:
        """Take the weights of ``--init`` over, where it is given."""
        if self.config.init is not None:
            initialize(roles, self.config.init, self.student_recording, self._say, self.config.trust_remote_code)

    # --- the run ------------------------------------------------------------------------------------------------

    def run(self) -> Path:
        """Train, then export the student. Returns its pipeline's folder, or its LoRA's where that is all."""
        why_whole = why_no_lora(self.recording, self.teacher_lora)
        if not self.config.lora_rank or self.config.merge or why_whole:
            refuse_own_code(self.pipeline)  # a student that cannot be written is not worth training
        with self.encoders.away(self._say):
            self._train_and_export()
        whole = self.out / "student"
        return whole if whole.is_dir() else self.out / "student_lora"

    def _train_and_export(self) -> None:
        method = method_class(self.method).prepare(self.config, self)
        self.claim()
        monitor = Monitor(self.out, self.config.max_steps, self.accelerator)
        if self.accelerator.log_with:
            self.accelerator.init_trackers("logs")
        role = sampling_role(method.roles)
        loop = Loop(
            method,
            self.method,
            self.config,
            conditions=self.conditions,
            real=self.real,
            shape=self.recording.sample_shape,
            device=self.device,
            processes=Processes(self.accelerator.process_index, self.accelerator.num_processes),
            monitor=monitor,
            on_samples=lambda step: self.save_samples(method.roles["teacher"], role, step),
            pairs=self.pairs,
        )
        if self.resuming:
            loop.resume()
        try:
            loop.run()
        finally:
            monitor.close()
        if self.accelerator.is_main_process:
            self.export(role)
            if self.config.push_to_hub is not None:
                self._say(publish(self.out, self.config.push_to_hub, self.config.hub_private))
        self.accelerator.wait_for_everyone()

    def export(self, role: Role) -> None:
        """Write a role as ``OUT/student``, a stock pipeline, or an adapter as ``OUT/student_lora``, or both."""
        about = {
            "method": self.method,
            "base_model": self.config.teacher,
            "teacher_license": teacher_license(self.config.teacher),
            "teacher_lora": self.teacher_lora,
            "training": {k: v for k, v in resolved(self.config).items() if k not in _PRIVATE},
        }
        if role.has_second_time:
            self.student_recording = flow_map_recording(self.recording, role.added[SECOND_TIME])
        if role.is_adapter:
            if role.has_second_time:
                self._say("no LoRA holds its second time: exported merged, as a pipeline")
            elif moves_boundary(self.recording, self.student_recording):
                self._say("its base model has no room for the student's networks: exported merged, as a pipeline")
            elif why_whole := why_no_lora(self.recording, self.teacher_lora):
                self._say(f"{why_whole}: exported merged")
            else:
                export_lora(self.recording, role, self.plan, self.out / "student_lora", **about)
                if not self.config.merge:
                    return
        self.encoders.restore()  # they are part of what is written
        if is_quantized(self.recording.network):
            recording, network = in_full_precision(self.config, self.recording, self.student_recording, role)
        else:
            recording, network = self.student_recording, whole_network(role)
        export_student(recording, network, self.plan, self.out / "student", **about)

    def save_samples(self, teacher: Role, student: Role, step: int) -> None:
        """``OUT/samples/step_*.png``: the teacher's samples above the student's, same noise and conditions."""
        path = self.out / "samples" / f"step_{step:08d}.png"
        self.previews.save(path, self.guided(teacher), student, self.sampler)

    def _tapped(self, role: Role) -> tuple[FeatureTap, Tensor]:
        """Where a role's features are tapped, and those of two samples of noise."""
        x = Draws(self.config.seed, OBSERVATION_STEP, range(2), self.device).normal("tap", self.recording.sample_shape)
        t = torch.full((2,), 0.5, dtype=torch.float64, device=self.device)
        return tapped([expert.denoiser for expert in role.experts.values()], x, t, self.conditions)

    def _walk_student(self) -> None:
        """Run the student's pipeline, untrained, at every count that is planned."""
        scheduler = {find_scheduler(self.pipeline): self.plan.scheduler}
        check_counts(self.student_recording, with_parts(self.student_recording.pipeline, **scheduler), self.plan)

    def _say(self, line: str) -> None:
        if self.accelerator.is_main_process and line:
            logger.info(line)


def distill(teacher: str | Path | DiffusionPipeline, method: str = "dmd2", **settings: Any) -> Path:
    """Distil a teacher and export the student: the command line's ``fewstep distill`` as a function.

    Args:
        teacher: folder, hub id, embedded name, or a loaded pipeline.
        method: a file name of ``fewstep.trainers``.
        **settings: fields of the method's configuration (``out`` is required), see ``fewstep distill METHOD --help``.

    Returns:
        The student's folder, a stock diffusers pipeline; with ``lora_rank`` and no ``merge`` that of its LoRA.

    Raises:
        UserError: for everything that a user can mend.
        fewstep.training.loop.Interrupted: after Ctrl-C, with a checkpoint written.
    """
    pipeline = teacher if isinstance(teacher, DiffusionPipeline) else None
    name = str(teacher) if pipeline is None else name_of(pipeline)
    try:
        config = method_class(method).Config(teacher=name, **settings)
    except TypeError as error:
        raise UserError(f"{method} has no such setting: {error}") from error
    return Distillation(config, method, pipeline).run()
