"""MF-RAE: a mean flow learnt in stages (2025, arXiv 2511.13019), in the latents of any autoencoder.

A mean flow that starts as a flow network has to chase its own derivative. So it first learns the average velocities
between states of its teacher's own trajectories, which hold still; then the identity along the teacher's velocity; and
last, where there are real images, along theirs, which the teacher's errors no longer bound.

    accelerate launch -m fewstep.trainers.mf_rae --teacher DIR --prompts FILE --stages cmt:2000,mfd --steps 4 --out OUT

- ``cmt``: consistency mid-training: u(x_i, t_i, r_j) = (x_i - x_j) / (t_i - t_j) for pairs of states of one walk
- ``mfd``: mean-flow distillation: :mod:`fewstep.trainers.mean_flow` with the teacher's velocity
- ``mft``: bootstrapping: the same with noise - x0 of ``--data``, the one-point estimator

One command, one optimizer and one average for all stages. Latents are those of the teacher's own pipeline: of a
representation autoencoder where its autoencoder is diffusers' ``AutoencoderRAE``.

Departures: walks take the teacher's own shift and guidance, and their states are told their own times (``--label_times
uniform_grid``: the released code's, where they do not meet). All stages have one learning rate and one decay.
Differences are one-sided at the ends of the flow, have no graph, and are taken where t and r differ alone. Labels are
dropped where mft is guided alone. Without ``--data`` mfd learns at noised samples of the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fewstep.cli.distill import main
from fewstep.data.batch import Batch
from fewstep.diffusion.ode import OdeSolver, teacher_times
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.trajectories import Chord, trajectories
from fewstep.losses.consistency import distance
from fewstep.networks.flow_map import FlowMapDenoiser
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.roles import Role
from fewstep.trainers._mf_rae_config import MfRaeConfig
from fewstep.trainers.mean_flow import MeanFlow
from fewstep.training.method import Bench, Turn


class MfRae:
    """The method; see the module. Roles: student, teacher, ema if asked for; both but the teacher of two times.

    Args:
        config: of the run.
        roles: by name.
        guided_teacher: whose trajectories are learnt.
        sampler: the student's.
        entries: of a sample.
        shift: of the teacher's own grid, where it is a flow teacher.
    """

    Config = MfRaeConfig

    def __init__(
        self,
        config: MfRaeConfig,
        roles: dict[str, Role],
        guided_teacher: GuidedDenoiser,
        sampler: Sampler,
        entries: int,
        shift: float = 1.0,
    ) -> None:
        config = config.resolved()
        self.config, self.roles, self.sampler = config, roles, sampler
        student = roles["student"].denoiser
        assert isinstance(student, FlowMapDenoiser)  # it is one network
        self.student, self.teacher = student, guided_teacher
        # A walk is one of rectified flow, whose average velocities are learnt, in every schedule.
        self.solver = OdeSolver(guided_teacher, sampler.schedule, config.walk_solver, line="flow")
        self.times = teacher_times(sampler.schedule, config.walk_steps, shift)
        self.flows: dict[tuple[str, int], MeanFlow] = {}
        for stage in config.starts():
            if stage != "cmt":
                self.flow(stage, entries)

    @classmethod
    def prepare(cls, config: MfRaeConfig, bench: Bench) -> MfRae:
        """Make the roles: the student starts as the teacher, or as in --init."""
        config = config.resolved()
        roles = bench.make_flow_map_roles(differentiated=config.differentiates)
        bench.describe(trained_at_every_count=True)
        entries = math.prod(bench.recording.sample_shape)
        return cls(config, roles, bench.guided(roles["teacher"]), bench.sampler, entries, bench.shift)

    def flow(self, stage: str, entries: int) -> MeanFlow:
        """MeanFlow as it is in a stage, of samples with so many entries, by which its times are shifted."""
        if (stage, entries) not in self.flows:
            config = self.config.of_stage(stage, entries)
            self.flows[stage, entries] = MeanFlow(config, self.roles, self.teacher, self.sampler)
        return self.flows[stage, entries]

    def learning_rate(self, role: str) -> float:
        """Of the student."""
        return self.config.lr

    @property
    def uneven(self) -> bool:
        """As in MeanFlow."""
        return any(flow.uneven for flow in self.flows.values())

    def turns(self, step: int, batch: Batch) -> Iterator[Turn]:
        """One update of the student in every step, by the stage that it falls in."""
        stage, first = self.config.stage_at(step)
        if stage != "cmt":
            yield from self.flow(stage, math.prod(batch.shape)).turns(step - first, batch)
            return

        # 1. Walks of the teacher, each for some samples of the batch.
        shared = self.config.pairs_per_walk
        first_of = [row - row % shared for row in range(batch.size)]
        chord = self.chords(batch, first_of)

        # 2. Between two states of a walk the student says their average velocity.
        u = self.student.velocity(chord.x_t, chord.t, batch.conditioning.select(first_of), chord.r)
        loss = distance(self.config.cmt_distance, u, chord.velocity).mean()
        error = (u.detach() - chord.velocity).square().mean()
        yield Turn("student", [(loss, None)], {"student/trajectory": loss.detach(), "student/velocity_error": error})

    @torch.no_grad()
    def chords(self, batch: Batch, first_of: list[int]) -> Chord:
        """A pair of states for every sample, of the walk of the sample that is named."""
        walked = sorted(set(first_of))
        noise: Tensor = batch.draws.normal("noise", batch.shape)[:: self.config.pairs_per_walk]
        start = self.sampler.schedule.initial_scale() * noise
        conditioning = batch.conditioning.select(walked)
        walks = trajectories(self.solver, start, self.times, conditioning, self.config.label_times)
        pair = batch.draws.integers("pair", 0, walks.pairs)
        return walks.chords(pair, torch.arange(batch.size, device=pair.device) // self.config.pairs_per_walk)


if __name__ == "__main__":
    main("mf_rae")
