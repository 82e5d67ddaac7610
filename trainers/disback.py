"""DisBack (arXiv 2408.15991): distribution matching whose target comes back from the student to the teacher.

A student at its start and the teacher are far apart, and a critic says little about the way between them. So a copy of
the teacher is first degraded, by denoising what the untrained student makes, and kept from time to time: these nodes
are the way. Then the student is distilled by DMD2 with one node after another as the target, the most degraded ones
first, and at last with the teacher itself.

    accelerate launch -m fewstep.trainers.disback --teacher DIR --prompts FILE --steps 1 --out OUT

The copy that is degraded is the critic, which has to start where it arrives. Nodes have its form: adapters with
``--lora_rank``, which makes the path cheap, else whole networks, all of them in memory. They are kept with the
checkpoints; ``--init RUN --recorded true`` goes back over the path of another run, whose nodes must be all there, and
fit. Everything else is DMD2's, its GAN and its relatives included (:mod:`fewstep.trainers.dmd2`).

Departures: written from the paper's description, as the released code never exchanges its target. The last node is no
target, since the critic starts there: between the two there is nothing to learn. The head of a GAN begins with the way
back. The published SDXL student was distilled by DMD2 before; here that is ``--init``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from fewstep.cli.distill import main
from fewstep.data.batch import Batch
from fewstep.diffusion.rollout import Sampler
from fewstep.networks.features import FeatureTap
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.roles import NODE, Role
from fewstep.trainers._disback_config import DisbackConfig
from fewstep.trainers.dmd2 import Dmd2
from fewstep.training.method import Bench, Order, Renew, Turn
from fewstep.training.rewards import Rewards


class Disback:
    """The method; see the module. Roles: those of DMD2, and the frozen nodes critic_node_1 (the teacher's side), ...

    Args:
        config: of the run.
        roles: by name.
        targets: under guidance, in the order in which they are targets; the teacher is the last one.
        sampler: of the student.
        tap: where the GAN head sees features, if there is one.
        shift: of the times at which critic and target are compared.
        rewards: of the student's pictures, if there are any.
        grid_shift: of the teacher's walk, where the student's first step is taught by it.
    """

    Config = DisbackConfig

    def __init__(
        self,
        config: DisbackConfig,
        roles: dict[str, Role],
        targets: Sequence[GuidedDenoiser],
        sampler: Sampler,
        tap: FeatureTap | None = None,
        shift: float = 1.0,
        rewards: Rewards | None = None,
        grid_shift: float = 1.0,
    ) -> None:
        config = config.resolved()
        self.config, self.roles, self.sampler, self.tap = config, roles, sampler, tap
        self.critic, self.teacher = roles["critic"], targets[-1]
        self.nodes = [roles[name] for name in node_names(config)]
        for node in self.nodes:
            node.kept, node.wanted_of_init = True, config.recorded
        self.matchers = [Dmd2(config, roles, one, sampler, tap, shift, rewards, grid_shift) for one in targets]

    @classmethod
    def prepare(cls, config: DisbackConfig, bench: Bench) -> Disback:
        """Make the roles: all start as the teacher, or student and critic, and a recorded path, as in --init."""
        config = config.resolved()
        names = node_names(config)
        last = Dmd2.prepare_with(config, bench, *names)
        back = [bench.guided(last.roles[name], config.node_guidance_scale) for name in reversed(names[:-1])]
        shift = config.shift_of_times(bench.sampler.schedule, bench.shift)
        return cls(config, last.roles, [*back, last.teacher], bench.sampler, last.tap, shift, last.rewards, bench.shift)

    def learning_rate(self, role: str) -> float:
        """Of the student, or of the critic and a discriminator of its own."""
        return self.config.learning_rate(role)

    def place(self, step: int) -> int:
        """Which target a step on the way back has; -1 on the way to the last node."""
        back = step - self.config.degradation
        if back < 0:
            return -1
        return min(back // self.config.of_each, len(self.matchers) - 1) if self.nodes else 0

    def turns(self, step: int, batch: Batch) -> Iterator[Turn | Order]:
        """The critic alone while the path is recorded; then DMD2's turns, with the target of this step."""
        # 1. The way to the student, which stands still: the critic learns what it makes.
        number, start = self.place(step), self.config.degradation
        if number < 0:
            with torch.no_grad():
                x0 = self.matchers[-1].sample(batch, False).x0
            loss, log = self.matchers[-1].critic_loss(x0, batch)
            yield Turn("critic", [(loss, None)], log)
            # Here the critic has made its update. It is an order, for a step may be played again without one.
            if step + 1 in self.config.path:
                yield Renew(self.nodes[self.config.path.index(step + 1)].name, like="critic")
            return

        # 2. The way back. It begins with the critic at the last node.
        if step == start and self.nodes:
            yield Renew("critic", like=self.nodes[-1].name)
        for turn in self.matchers[number].turns(step - start, batch):
            if isinstance(turn, Turn) and turn.role == "student":
                turn.log["student/node"] = torch.tensor(float(len(self.matchers) - 1 - number))
            yield turn


def node_names(config: DisbackConfig) -> list[str]:
    """Of the roles of a path, from the teacher's side to the student's."""
    return [f"{NODE}{k}" for k in range(1, len(config.path) + 1)]


if __name__ == "__main__":
    main("disback")
