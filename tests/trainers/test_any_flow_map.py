"""AnyFlow's flow map, what its steps cost, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from toys import labels

from fewstep.errors import UserError
from fewstep.eval.bench.floors import declared
from fewstep.losses.flow_map import rebalanced
from fewstep.networks.flow_map import gap
from fewstep.programs.planning.call_counts import CallCounter
from tests.trainers.toy_any_flow import POLICY, SCHEDULES, batch, config, method

# --- the map ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("derivative", ["exact", "central"])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_target_is_the_identity_of_the_guided_flow(kind: str, derivative: str):
    step = {} if derivative == "exact" else {"derivative_step": 2e-2}
    one = method(config(max_steps=2, map_steps=1, derivative=derivative, **step), kind, guidance_scale=3.0)
    points = one.points(batch())
    teacher = one.roles["teacher"].denoiser
    positive, negative = (teacher.velocity(points.x_t, points.t, labels([label] * 8)) for label in (1.0, 0.0))
    torch.testing.assert_close(points.velocity, negative + 3 * (positive - negative), rtol=1e-4, atol=1e-3)
    u = one.student.velocity(points.x_t, points.t, points.conditioning, points.r)
    said, target, change = one.guided(points, u, one.change(points, u))
    assert said is u and not target.requires_grad
    assert not change[points.parts.equal].any() and bool(change[points.parts.apart].any(1).all())
    distance = gap(one.schedule, points.t, points.r).float()[:, None]
    torch.testing.assert_close(target, points.velocity - distance * change)
    torch.testing.assert_close(target[points.parts.equal], points.velocity[points.parts.equal])


def test_differences_and_the_exact_derivative_agree():
    found = []
    for derivative, step in (("exact", 5e-3), ("central", 5e-3), ("backward", 1e-3)):
        one = method(config(max_steps=2, map_steps=1, derivative=derivative, derivative_step=step))
        points = one.points(batch())
        u = one.student.velocity(points.x_t, points.t, points.conditioning, points.r)
        found.append(one.change(points, u))
    torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=2e-3)
    torch.testing.assert_close(found[2], found[0], rtol=1e-2, atol=5e-3)


def test_the_authors_form_fuses_guidance_and_divides_the_derivative_where_the_condition_was_kept():
    settings = {"velocity": "data", "data": "images", "max_steps": 2, "map_steps": 1, "label_drop": 0.4}
    one = method(config(**settings, map_guidance=4.0), guidance_scale=2.0)
    assert one.config.rebalance and one.teacher.guidance_scale == 2.0
    points, given = one.points(batch(32)), batch(32)
    dropped = torch.tensor(given.draws.coins("label_drop", 0.4))
    assert torch.equal(points.kept, ~dropped) and 3 < int(dropped.sum()) < 29
    assert torch.equal(points.conditioning.arguments()["label"], points.kept.float())
    torch.testing.assert_close(points.velocity, given.draws.normal("map_noise", (6,)) - given.real.x0)
    u = one.student.velocity(points.x_t, points.t, points.conditioning, points.r)
    change = one.change(points, u)
    said, target, divided = one.guided(points, u, change)
    u_null = one.student.velocity(points.x_t, points.t, labels([0.0] * 32), points.r)
    kept = points.kept[:, None]
    torch.testing.assert_close(said, torch.where(kept, (u + 3 * u_null) / 4, u))
    torch.testing.assert_close(divided, torch.where(kept, change / 4, change))
    each = one.errors(points, said, target)
    apart = torch.zeros(32, dtype=torch.bool)
    apart[points.parts.apart] = True
    level = each[~apart].mean()
    torch.testing.assert_close(one.balanced(points, each), rebalanced(each, apart, level, 1e-5 * level))
    torch.testing.assert_close(one.balanced(points, each)[apart], level.expand(16), rtol=1e-3, atol=0)


def test_a_teachers_map_weighs_each_sample_by_its_own_error_and_the_authors_form_does_not():
    one = method(config(max_steps=2, map_steps=1, weighting="uniform", weight_constant=0.5))
    assert (one.config.weight_power, one.config.rebalance) == (1.0, False)
    points = one.points(batch())
    u, target = torch.randn(8, 6, requires_grad=True), torch.zeros(8, 6)
    found = one.errors(points, u, target)
    error = u.detach().square().mean(1)
    torch.testing.assert_close(found, error / (error + 0.5))
    (gradient,) = torch.autograd.grad(found.sum(), u)
    torch.testing.assert_close(gradient, 2 * u.detach() / 6 / (error + 0.5)[:, None])  # the weight is held fixed
    data = {"velocity": "data", "data": "images", "max_steps": 2, "map_steps": 1}
    assert method(config(**data)).config.weight_power == 0.0
    weighed = method(config(**data, weight_power=1.0)).config
    assert (weighed.weight_power, weighed.rebalance) == (1.0, False)


@pytest.mark.parametrize("kind", ["flow", "epsilon"])
def test_errors_weigh_by_flow_time_as_the_beta_density_does(kind: str):
    """q sqrt(1 - q) over its integral, 4/15; the authors read it on a table of 1000 times."""
    one = method(config(max_steps=2, map_steps=1, weight_power=0.0), kind)
    points = one.points(batch(64))
    alpha, sigma = SCHEDULES[kind].coefficients(points.t)
    q = sigma / (alpha + sigma)
    found = one.errors(points, torch.ones(64, 6), torch.zeros(64, 6))
    torch.testing.assert_close(found.double(), 15 / 4 * q * (1 - q).sqrt(), rtol=0, atol=0.02)


def test_a_batch_without_a_sample_to_measure_by_is_not_rebalanced():
    settings = {"velocity": "data", "data": "images", "max_steps": 2, "map_steps": 1, "equal_share": 0.0}
    one = method(config(**settings))
    points = one.points(batch())
    each = torch.rand(8)
    assert torch.equal(one.balanced(points, each), each)


# --- costs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"stage": "map"}, 3.0),
        ({"stage": "map", "derivative": "central"}, 1.0),
        ({"stage": "map", "derivative": "backward", "velocity": "data", "data": "images"}, 3.0),
        ({**POLICY}, 3.0),
        ({**POLICY, "map_weight": 0.0, "critic_updates": 2, "segments": 2}, 1.0),
    ],
)
def test_a_step_costs_what_it_declares(settings: dict, scale: float):
    one = method(config(max_steps=40, **settings), guidance_scale=scale)
    counter = CallCounter(one)
    with counter:
        for step in range(8):
            for turn in one.turns(step, batch(step=step)):
                tensors, given = zip(*turn.backward, strict=True)
                given = [torch.ones_like(t) if g is None else g for t, g in zip(tensors, given, strict=True)]
                torch.autograd.backward(tensors, given, inputs=one.roles[turn.role].parameters())
    for step in range(8):
        assert declared(one, step, batch(step=step)) == counter.calls(step)
        assert counter.wasted(step) == {}


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": "last"}, "--stage must be one of both, map, on_policy"),
        ({"stage": "on_policy"}, "--stage on_policy goes on from a flow map: give --init"),
        ({"stage": "map", "map_steps": 3}, "leave out --map_steps: it belongs to a run of both stages"),
        ({"stage": "map", "on_policy_lr": 1e-6}, "leave out --on_policy_lr: it belongs to stage 2"),
        ({"max_steps": 4, "map_steps": 4}, "--map_steps 4 of --max_steps 4 leave one of the two stages without a step"),
        ({"rollout_steps": [2], "segments": 3}, "--segments 3 are more than the 2 steps of a rollout"),
        ({"steps": 1, "segments": 2}, "--segments 2 are more than the 1 steps"),
        ({"segments": 4}, "--segments must be at most 3"),
        ({"rollout_steps": [2, 0]}, "--rollout_steps takes different numbers of steps"),
        ({"rollout_steps": [2, 2]}, "--rollout_steps takes different numbers of steps"),
        ({"equal_share": 0.8, "zero_share": 0.3}, "more than 1 together"),
        ({"equal_share": 1.0, "zero_share": 0.0}, "--equal_share must be below 1"),
        ({"velocity": "data"}, "--velocity data is that of given samples: give --data or --pairs"),
        ({**POLICY, "map_weight": 0.0, "data": "x"}, "--data and --pairs are used by the map's loss alone"),
        ({"matching_weight": 0.0}, "take --stage map for the map alone"),
        ({"renoise": "fresh"}, "--renoise must be ode"),
        ({"rebalance": True, "weight_power": 0.5}, "--rebalance and --weight_power each scale a sample's error"),
        ({"weight_power": -1.0}, "--weight_power"),
        ({"weighting": "cosine"}, "--weighting must be one of"),
        ({"derivative_step": 0.7}, "below 0.5"),
        ({"data": "x", "pairs": "y"}, "give --data or --pairs, not both"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_in_one_line(settings: dict, message: str):
    with pytest.raises(UserError, match=message) as caught:
        config(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["run", "student"])
@pytest.mark.parametrize(
    ("stage", "method_name", "theirs", "message"),
    [
        ("on_policy", "dmd2", None, "is of dmd2, whose student has no second time: stage on_policy goes on from"),
        ("map", "any_flow", "on_policy", "has been through stage on_policy, which comes after the map"),
        ("both", "any_flow", "both", "has been through stage on_policy, which comes after the map"),
        ("on_policy", "any_flow", "map", None),
        ("on_policy", "any_flow", "both", None),
        ("on_policy", "mean_flow", None, None),
        ("map", "mean_flow", None, None),
    ],
)
def test_stages_in_the_wrong_order_are_refused(
    stage: str, method_name: str, theirs: str | None, message: str | None, form: str, tmp_path: Path
):
    if form == "run":
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"method": method_name, "stage": theirs}))
    else:
        about = {"method": method_name, "training": {"stage": theirs}}
        (tmp_path / "fewstep.json").write_text(json.dumps(about))
    settings = config(stage=stage, init=str(tmp_path))
    if message is None:
        settings.refuse_wrong_order()
        return
    with pytest.raises(UserError, match=message):
        settings.refuse_wrong_order()


def test_an_init_that_says_nothing_of_itself_is_left_to_its_weights(tmp_path: Path):
    config(stage="on_policy", init=str(tmp_path)).refuse_wrong_order()
