"""What a method's steps cost in network calls: they are played on stand-ins and counted, and nothing is trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fewstep.config.run import RunConfig
from fewstep.diffusion.draws import Draws
from fewstep.networks.make_roles import RoleSettings
from fewstep.programs.planning.call_counts import CallCounter, Calls, forward_passes
from fewstep.programs.planning.dry_run import DryRun, LongestDraws
from fewstep.programs.planning.stand_in import stand_in
from fewstep.recording import Recording

#: Over how many steps network calls are averaged.
PERIOD = 100
_GOLDEN = (5**0.5 - 1) / 2
_SEARCHED = 50  # steps, first and last ones, among which the most costly one is looked for


class CountedDraws(Draws):
    """The draws of a step of which only calls are counted: noise is ones and times are halves, all else is drawn."""

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        self._claim(name)
        return torch.ones(len(self.indices), *shape)

    def uniform(self, name: str) -> Tensor:
        self._claim(name)
        return torch.full((len(self.indices),), 0.5, dtype=torch.float64)


class _EvenCountedDraws(CountedDraws):
    """The same where the student's walks end at each of its steps equally often, in every few training steps."""

    def shared_integer(self, name: str, low: int, high: int) -> int:
        self._claim(name)
        # Multiples of the golden ratio are spread evenly over the unit interval, and those of every k-th step, too.
        return low + int(self.step * _GOLDEN % 1.0 * (high - low))


class _LongestCountedDraws(CountedDraws, LongestDraws):
    """The same where every walk of the student is its longest."""


def count_calls(
    config: RunConfig, method: str, recording: Recording, steps: Iterable[int], draws: type[Draws] = CountedDraws
) -> dict[int, dict[str, Calls]]:
    """What each of some steps of a run costs in network calls, by role and per sample.

    Args:
        config: of the run.
        method: its name.
        recording: of the teacher, weightless or real.
        steps: of the run.
        draws: the class of the steps' draws, which decide where the student's walk ends.
    """
    # Whether roles are copies or adapters makes no difference to what is called.
    dry_run = DryRun(config, method, stand_in(recording), roles=RoleSettings())
    prepared = dry_run.prepare()
    with CallCounter(prepared) as counter:
        for step in steps:
            dry_run.play(prepared, step, draws)
    return {step: counter.calls(step) for step in counter.steps}


def costliest_step(config: RunConfig, method: str, recording: Recording) -> int:
    """The step with most network calls, of the first and the last fifty, each with the student's longest walk."""
    last = config.max_steps
    steps = sorted({*range(min(_SEARCHED, last)), *range(max(0, last - _SEARCHED), last)})
    counted = count_calls(config, method, recording, steps, _LongestCountedDraws)
    return max(steps, key=lambda step: forward_passes(counted[step]))


def mean_calls(config: RunConfig, method: str, recording: Recording) -> dict[str, Calls]:
    """Network calls of a step, per sample, in the mean over the run's last :data:`PERIOD` steps and all walks."""
    last = config.max_steps
    steps = range(max(0, last - PERIOD), last)
    sums: dict[str, dict[str, float]] = {}
    for calls in count_calls(config, method, recording, steps, _EvenCountedDraws).values():
        for name, one in calls.items():
            kinds = sums.setdefault(name, dict.fromkeys(vars(one), 0.0))
            for kind, count in vars(one).items():
                kinds[kind] += count
    return {name: Calls(**{kind: n / len(steps) for kind, n in kinds.items()}) for name, kinds in sums.items()}
