"""How a run's networks are computed, where its settings ask for more than what they do by themselves."""

from __future__ import annotations

from collections.abc import Mapping

from fewstep.config.attention import AUTO
from fewstep.networks.attention_trial import use_attention_backend
from fewstep.networks.compile_trial import compile_roles
from fewstep.networks.roles import Role
from fewstep.programs.workbench import Workbench


def make_faster(bench: Workbench, roles: Mapping[str, Role]) -> None:
    """Let the roles' networks run as ``--attention_backend`` and ``--compile`` say, where that is right here; say how.

    Args:
        bench: of the run.
        roles: of the run, before its training.
    """
    _use_wanted_attention(bench, roles)
    if bench.config.compile:
        (x, t, _), size = bench.two_samples(), bench.config.batch_size
        rows = [0] * size
        conditioning = bench.with_default_guidance(bench.conditions.select(rows))
        bench.say(compile_roles(roles, x[rows], t[rows], conditioning, bench.say))


def _use_wanted_attention(bench: Workbench, roles: Mapping[str, Role]) -> None:
    backend = bench.config.attention_backend
    if backend == AUTO:
        return
    x, t, first = bench.two_samples()
    _, _, last = bench.two_samples(-1)  # of another length, perhaps, and with a mask
    bench.say(use_attention_backend(roles, backend, x, t, (first, last)))
