"""The two runs that rules are learnt from: their step counts, and in which steps of the long one the networks run.

Two counts, because on an even grid one count cannot tell the time from the next time. The network runs in every step of
the short run and in a few of the long one, which shows many times, and some near 0, at no cost.
"""

from __future__ import annotations

from collections.abc import Sequence

from fewstep.recording.loop.experts import Expert, expert_at
from fewstep.recording.rules.fit import differs
from fewstep.recording.watch.finite import floats
from fewstep.recording.watch.observation import Step

SHORT, LONG = 4, 101
# What changes from step to step is kept of every one: where samples are large, fewer steps are made, in so many bytes.
_ROOM, _FEWEST = 10**9, 21


def long_count(short: Sequence[Step]) -> int:
    """The steps of the long run, where these are those of the short one."""
    if not all(step.calls for step in short[:2]) or len(short) < 2:
        return LONG
    one, two = (step.calls[-1].arguments for step in short[:2])
    changing = [tensor for name, value in two.items() if differs(value, one.get(name)) for tensor in floats(value)]
    taken = sum(tensor.nbytes for tensor in [*changing, short[0].network_input])
    return max(_FEWEST, min(LONG, _ROOM // max(taken, 1)))


def live_steps(count: int, long: Sequence[Step] = (), experts: Sequence[Expert] = ()) -> frozenset[int]:
    """The steps of a long run in which the networks run: a few, and the first and last of every one of several."""
    ends = frozenset({0, count // 2, count - 2, count - 1})
    if len(experts) < 2:
        return ends
    called = [expert_at(experts, step.timestep) for step in long]
    own = [[i for i, one in enumerate(called) if one is expert] for expert in experts]
    return ends | {i for places in own if places for i in (places[0], places[-1])}


def steps_answered(runs: Sequence[list[Step]], experts: Sequence[Expert]) -> list[Step]:
    """The steps of the short and the long run in which a network ran."""
    live = live_steps(len(runs[1]), runs[1], experts)
    return runs[0] + [step for i, step in enumerate(runs[1]) if i in live]
