"""SiD's guidance, each scale in its own place, and what a step costs with it and without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toys import make_loop

from fewstep.eval.bench.floors import declared
from fewstep.programs.planning.call_counts import CallCounter, Calls
from tests.trainers.toy_sid import OFF, ROLES, batch, config, step_with_last, vector_method

# --- what a step costs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        OFF,
        {"guidance_scale": 2.0},
        {"guidance_scale": 2.0, "critic_guidance": 1.0, "critic_training_guidance": 0.5},
        {"guidance": "zero"},
        {"guidance": "anti"},
        {"critic_updates": 2},
        {"critic_warmup_steps": 5},
    ],
    ids=["plain", "long_short", "mixed", "zero", "anti", "two_updates", "warm_up"],
)
def test_a_step_costs_what_the_method_says(tmp_path: Path, settings: dict):
    method = vector_method(config(tmp_path, max_steps=12, log_steps=100, **settings))
    with CallCounter(method) as counter:
        make_loop(method, method.config).run()
    for step in set(counter.steps) - counter.logged:
        assert counter.calls(step) == declared(method, step, batch(step))
        assert counter.wasted(step) == {}


def test_guidance_doubles_the_calls_of_the_networks_that_it_guides(tmp_path: Path):
    step = step_with_last(0)
    costs = {
        name: declared(vector_method(config(tmp_path, **settings)), step, batch(step))
        for name, settings in {"plain": OFF, "lsg": {"guidance_scale": 2.0}, "zero": {"guidance": "zero"}}.items()
    }
    one = {"student": Calls(1, 1), "critic": Calls(0, 1, 1), "teacher": Calls(0, 0, 1)}
    assert costs["plain"] == costs["zero"] == one  # Zero-CFG: no second half anywhere
    assert costs["lsg"] == {"student": Calls(1, 1), "critic": Calls(0, 2, 2), "teacher": Calls(0, 0, 2)}


def test_what_is_only_looked_at_costs_calls_only_in_logged_steps(tmp_path: Path):
    logs = {}
    for logging in (False, True):
        method, calls = vector_method(config(tmp_path)), []
        method.roles["teacher"].denoiser.network.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        logs[logging] = next(method.turns(0, batch(0, logging=logging))).log
        assert len(calls) == logging
    assert logs[True].keys() - logs[False].keys() == {"critic/lag"}


# --- guidance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kappas"),
    [
        ({}, (4.5, 4.5, 4.5)),  # long and short: all four alike
        ({"critic_guidance": 1.0, "critic_training_guidance": 1.0}, (1.0, 1.0, 4.5)),  # long
        ({"critic_training_guidance": 0.5}, (0.5, 4.5, 4.5)),
        ({"guidance": "zero"}, (0.0, 0.0, 1.0)),
        ({"guidance": "anti"}, (-1.0, -1.0, 1.0)),
    ],
)
def test_the_four_scales(tmp_path: Path, settings: dict, kappas: tuple[float, float, float]):
    assert config(tmp_path, **settings).kappas(4.5) == kappas


def test_every_scale_acts_in_its_own_place(tmp_path: Path):
    """Each scale changes the loss it belongs to, and no other."""

    def losses(**settings) -> list[float]:
        method = vector_method(config(tmp_path, critic_dropout=0.0, **settings))
        return [turn.backward[0][0].item() for turn in method.turns(0, batch(0))]

    base = {"guidance_scale": 2.0, "critic_guidance": 2.0, "critic_training_guidance": 2.0}
    critic, student = losses(**base)
    for name, own in (("critic_training_guidance", 0), ("critic_guidance", 1), ("guidance_scale", 1)):
        changed = losses(**{**base, name: 3.0})
        assert [changed[0] != critic, changed[1] != student] == [own == 0, own == 1]


def test_under_zero_cfg_the_critic_never_hears_the_condition(tmp_path: Path):
    method, heard = vector_method(config(tmp_path, guidance="zero")), {name: [] for name in ROLES}
    for name in ROLES:
        network = method.roles[name].denoiser.network
        network.register_forward_pre_hook(
            lambda _m, _a, kwargs, name=name: heard[name].append(kwargs["label"]), with_kwargs=True
        )
    b = batch(step_with_last(0))
    list(method.turns(step_with_last(0), b))
    assert set(torch.cat(heard["critic"]).tolist()) == {5.0}
    assert torch.equal(heard["teacher"][0], b.conditioning.arguments()["label"])


def test_in_the_critics_turn_some_prompts_become_the_negative_for_student_and_critic_alike(tmp_path: Path):
    settings = config(tmp_path, guidance_scale=2.0, critic_dropout=0.5, batch_size=64)
    method, heard = vector_method(settings), {"student": [], "critic": []}
    for name, list_ in heard.items():
        network = method.roles[name].denoiser.network
        network.register_forward_pre_hook(lambda _m, _a, kw, to=list_: to.append(kw["label"]), with_kwargs=True)
    step = step_with_last(0)
    b = batch(step, range(64))
    generator = method.turns(step, b)
    next(generator)
    told = heard["student"][0]
    dropped = told == 5.0
    assert 20 < int(dropped.sum()) < 44
    assert torch.equal(told[~dropped], b.conditioning.arguments()["label"][~dropped])
    assert torch.equal(heard["critic"][0][64:], told)  # the negative half comes first
    next(generator)
    assert torch.equal(heard["student"][-1], b.conditioning.arguments()["label"])


def test_without_guidance_no_prompt_is_dropped(tmp_path: Path):
    assert not vector_method(config(tmp_path, **OFF)).drops
    assert vector_method(config(tmp_path, guidance="zero")).drops
    assert not vector_method(config(tmp_path, guidance="zero", critic_dropout=0.0)).drops
