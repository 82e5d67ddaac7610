"""Single goals of the core are measured, and what misses one for another reason than speed ends with code 1."""

from __future__ import annotations

import pytest
import torch

from fewstep.eval.bench import goals
from fewstep.kernels import score_gap

CPU = torch.device("cpu")
LATENTS, PARAMETERS = (2, 4, 8, 8), (5, 3, 4)


def exact(found: list[goals.Goal]) -> dict[str, bool]:
    return {goal.what: goal.met for goal in found if goal.exact}


def test_chains_and_updates_are_those_they_are_compared_with() -> None:
    chains = list(goals.chains(CPU, LATENTS, 1, False))
    assert len(chains) == 2 * len(goals.CHAINS) and all(goal.value > 0 for goal in chains)
    assert all(exact([*chains, *goals.update(CPU, PARAMETERS, 1)]).values())


def test_a_wrong_chain_and_a_read_of_the_host_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right, norm = score_gap.closed, torch.nn.utils.get_total_norm
    monkeypatch.setattr(score_gap, "closed", lambda *told: tuple(1.001 * one for one in right(*told)))
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda g: torch.tensor(norm(g).item()))
    met = exact([*goals.chains(CPU, LATENTS, 1, False), *goals.update(CPU, PARAMETERS, 1)])
    missed = {what for what, good in met.items() if not good}
    assert missed == {"DMD, eager: error", "the update: numbers that the host reads"}


@pytest.mark.soak
def test_every_goal_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(goals, "LATENTS", LATENTS)
    monkeypatch.setattr(goals, "PARAMETERS", PARAMETERS)
    table = goals.measure(CPU, blocks=1)
    assert table.failures == [] and {row["number"] for row in table.numbers} == {3, 5, 6, 7}
    (faster,) = (row for row in table.numbers if row["what"] == "two roles entered and left")
    assert faster["met"]
