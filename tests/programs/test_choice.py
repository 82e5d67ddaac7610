"""What auto chooses among measured students: by hand, and what the shipped file leads to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from fewstep.config.run import RunConfig
from fewstep.programs.choice import Candidate, Evidence, choices, shipped_evidence
from fewstep.programs.methods import method_class


def measured(method: str, fd: float, **others: Any) -> Candidate:
    """A student at 4 steps of one seed, without images."""
    about = {"kind": "flow", "steps": 4, "images": False, "seeds": 1, "passes": 100, "cell": f"{method}_4"}
    about |= {"lowest": fd, "highest": fd, "over": fd, "teacher": "fashion-flow", "teacher_steps": 25, "settings": {}}
    return Candidate(**{"method": method, "fd": fd, **about, **others})


def order(evidence: Evidence, *asked: Any) -> list[str]:
    return [one.method for one in evidence.in_order(*asked)]


def test_the_lowest_distance_is_taken_and_the_others_follow() -> None:
    evidence = Evidence(1.0, (measured("b", 0.8), measured("a", 0.5), measured("c", 1.0)))
    assert order(evidence, "flow", 4, False) == ["a", "b", "c"]


def test_of_those_within_the_spread_of_seeds_the_cheapest_to_train_is_taken() -> None:
    best = measured("best", 0.5, lowest=0.48, highest=0.56, seeds=3, passes=300)
    cheap = measured("cheap", 0.6, lowest=0.55, highest=0.65, seeds=3, passes=200)
    apart = measured("apart", 0.6, lowest=0.57, highest=0.65, seeds=3, passes=100)
    assert Evidence(2.0, (best, cheap, apart)).preferred((best, cheap, apart)) == cheap


def test_a_student_of_one_seed_is_taken_to_vary_as_others_do() -> None:
    """Its ends are 0.6 / 1.1 and 0.6 times 1.1 where the highest of several seeds is 1.21 times the lowest."""
    best, single = measured("best", 0.5, lowest=0.5, highest=0.55, seeds=3, passes=9), measured("single", 0.6, passes=1)
    assert Evidence(1.21, ()).ends(single) == pytest.approx((0.6 / 1.1, 0.66))
    assert Evidence(1.21, ()).preferred((best, single)) == single
    assert Evidence(1.0, ()).preferred((best, single)) == best


def test_between_two_counts_the_larger_counts_and_beyond_the_last_the_last() -> None:
    rows = [measured(f"at{steps}", 1.0, steps=steps) for steps in (1, 2, 4)]
    evidence = Evidence(1.0, tuple(rows))
    taken = {steps: order(evidence, "flow", steps, False) for steps in (1, 2, 3, 4, 5, 8, 50)}
    assert taken == {1: ["at1"], 2: ["at2"], 3: ["at4"], 4: ["at4"], 5: ["at4"], 8: ["at4"], 50: ["at4"]}
    with_eight = Evidence(1.0, (*rows, measured("at8", 2.0, steps=8)))
    assert {steps: order(with_eight, "flow", steps, False) for steps in (4, 5, 9)} == {
        4: ["at4"],
        5: ["at8"],
        9: ["at8"],
    }


def test_without_images_only_those_that_needed_none_are_taken() -> None:
    evidence = Evidence(1.0, (measured("images", 0.4, images=True), measured("none", 0.8)))
    assert order(evidence, "flow", 4, True) == ["images", "none"]
    assert order(evidence, "flow", 4, False) == ["none"]


def test_each_kind_has_its_own_and_edm_that_of_flows() -> None:
    evidence = Evidence(1.0, (measured("flows", 1.0), measured("tables", 0.5, kind="table")))
    assert [order(evidence, kind, 4, False) for kind in ("flow", "table", "edm")] == [["flows"], ["tables"], ["flows"]]
    assert Evidence(1.0, ()).in_order("flow", 4, True) == []


@dataclass(kw_only=True)
class Example(RunConfig):
    """A method's settings."""

    form: str = "plain"
    head: bool = False
    gan_weight: float = 0.0
    dropped: float = 0.1
    pairs: int = 8
    intervals: int | None = None


def test_to_another_teacher_goes_the_form_of_a_method_and_no_size() -> None:
    told = {"form": "other", "head": True, "gan_weight": 0.03, "dropped": 0.0, "renoise": "ode"}
    sizes = {"pairs": 4, "intervals": 20, "lr": 2e-4, "ema_decay": 0.9, "lr_warmup_steps": 5, "first_timestep": None}
    assert choices(Example, RunConfig, told | sizes) == told


def test_a_file_holds_what_it_was_made_of() -> None:
    evidence = Evidence(1.3, (measured("a", 0.5, settings={"lr": 2e-4, "variant": "cd"}), measured("b", 0.7)))
    content = json.loads(evidence.text())
    assert Evidence(content["spread"], tuple(Candidate(**one) for one in content["candidates"])) == evidence
    assert len(evidence.text().splitlines()) == 7


# --- what ships -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flow", "table", "edm"])
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("images", [True, False])
def test_there_is_a_choice_for_every_case(kind: Any, steps: int, images: bool) -> None:
    best = shipped_evidence().in_order(kind, steps, images)[0]
    assert best.steps == steps
    assert images or not best.images


@pytest.mark.parametrize("one", shipped_evidence().candidates, ids=lambda one: f"{one.cell}")
def test_every_candidate_can_be_run(one: Candidate) -> None:
    """With its whole recipe, and with its form alone; what a user is to say is not in it."""
    config_class = method_class(one.method).Config
    form = choices(config_class, RunConfig, one.settings)
    for settings in (one.settings, form):
        config_class(teacher="t", out="o", steps=one.steps, data="d" if one.images else None, **settings)
    assert one.settings.keys().isdisjoint({"teacher", "out", "steps", "data", "seed", "resume", "cpu"})
