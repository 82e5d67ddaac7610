"""How a run's networks are computed, where its settings ask for more than what they do by themselves."""

from __future__ import annotations

from collections.abc import Mapping

from fewstep.config.attention import AUTO
from fewstep.networks.attention_trial import use_attention_backend
from fewstep.networks.roles import Role
from fewstep.programs.workbench import Workbench


def use_wanted_attention(bench: Workbench, roles: Mapping[str, Role]) -> None:
    """Let the roles' networks run their attention as ``--attention_backend`` says, where that is right here; say which.

    Args:
        bench: of the run; its first and its last condition are tried.
        roles: of the run, before its training.
    """
    backend = bench.config.attention_backend
    if backend == AUTO:
        return
    x, t, first = bench.two_samples()
    _, _, last = bench.two_samples(-1)
    bench.say(use_attention_backend(roles, backend, x, t, (first, last)))
