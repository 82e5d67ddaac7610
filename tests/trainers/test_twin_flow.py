"""TwinFlow: its parts, whom its terms reach, and settings that cannot be meant."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.prediction import expand
from fewstep.diffusion.signed_times import BASE_PARTS, PARTS, BatchParts
from fewstep.errors import UserError
from fewstep.eval.bench.floors import declared
from fewstep.programs.planning.call_counts import CallCounter
from fewstep.trainers.twin_flow import Points, TwinFlow
from tests.trainers.toy_any_flow import SCHEDULES
from tests.trainers.toy_twin_flow import batch, config, method

DEFAULT = ("e2e", "mul", "any", "adv")

# --- parts ------------------------------------------------------------------------------------------------------------


def test_parts_are_equal_and_spread_and_the_same_however_the_step_is_split():
    parts = BatchParts((*DEFAULT, "e2e"), 1e-3, 1.0)
    whole = parts.draw(Draws(0, 3, range(20)), 20)
    assert [whole.part.count(part) for part in DEFAULT] == [8, 4, 4, 4]
    shares = [parts.draw(Draws(0, 3, range(first, first + 5)), 20) for first in range(0, 20, 5)]
    assert [part for share in shares for part in share.part] == whole.part
    assert [t for share in shares for t in share.t] == whole.t
    assert all({"e2e", "adv"} & {*share.part} for share in shares)
    assert parts.share(("e2e",), 20) == 0.4 and parts.share(BASE_PARTS, 20) == 0.8


def test_parts_take_turns_where_a_step_has_fewer_samples():
    parts = BatchParts(DEFAULT, 1e-3, 1.0)
    turns = [parts.draw(Draws(0, step, [0]), 1).part for step in range(8)]
    assert turns == [[part] for part in (*DEFAULT, *DEFAULT)]
    assert parts.share(("e2e",), 1) == 0.25


def test_times_are_those_of_each_part():
    parts = BatchParts(PARTS, 1e-3, 0.9)
    found = parts.draw(Draws(0, 0, range(600)), 600)
    for part in PARTS:
        rows = found.rows(part)
        t, r = (torch.tensor([values[row] for row in rows]) for values in (found.t, found.r))
        assert len(rows) == 100 and bool((r <= t).all()) and bool((t >= 1e-3).all()) and bool((t <= 0.9).all())
        if part in ("e2e", "one"):
            assert not r.any() and bool((t == 0.9).all()) == (part == "e2e")
        elif part in ("flow", "adv"):
            assert torch.equal(t, r)
        else:
            assert float(((t - r) / t).max()) == pytest.approx(0.05 if part == "mul" else 1.0, abs=0.03)


def test_a_second_time_below_the_lowest_time_is_the_clean_sample():
    found = BatchParts(("any", "mul"), 0.4, 1.0, 0.5).draw(Draws(0, 0, range(200)), 200)
    wide, close = (Draws(0, 0, range(200)).numbers(name) for name in ("any", "mul"))
    ends = [t * (1 - (w if part == "any" else c / 2)) for t, part, w, c in zip(found.t, found.part, wide, close)]
    assert found.r == pytest.approx([0.0 if end < 0.4 else end for end in ends])
    assert {part for part, r in zip(found.part, found.r) if r == 0} == {"any", "mul"}


def test_a_second_time_never_lies_above_the_first_which_is_an_entry_of_the_table():
    trained = method(config(parts=["flow", "mul", "adv"], data="images", reference="frozen"), "epsilon")
    drawn = trained.parts.draw(batch(48).draws, 48).on("cpu")
    points = trained.points(batch(48))
    assert bool((points.t < drawn[1]).any())  # rounded down
    torch.testing.assert_close(points.r, torch.minimum(drawn[1], points.t), rtol=0, atol=0)


# --- whom the terms reach ---------------------------------------------------------------------------------------------


def losses(trained: TwinFlow, given: Batch) -> Tensor:
    (turn,) = trained.turns(0, given)
    assert turn.role == "student"
    ((loss, gradient),) = turn.backward
    assert gradient is None
    return loss


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(
    "settings",
    [{"data": "images", "target_decay": 0.9}, {}, {"image_free": True}, {"data": "images", "reference": "frozen"}],
    ids=["data", "pairs", "image-free", "frozen"],
)
def test_one_update_of_the_student_alone(kind: str, settings: dict):
    trained = method(config(**settings), kind, 3.0)
    loss = losses(trained, batch())
    loss.backward()
    reached = {name for name, role in trained.roles.items() for p in role.weights.parameters() if p.grad is not None}
    assert reached == {"student"} and torch.isfinite(loss)
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in trained.roles["student"].parameters())


def weights_of(trained: TwinFlow, **changes) -> TwinFlow:
    trained.config = replace(trained.config, **changes).resolved()
    return trained


def test_rectification_moves_one_step_samples_by_how_the_velocities_differ():
    """With a square as distance the gradient at the velocity is 2 (fake - real) / numbers, clipped, of e2e alone."""
    trained = weights_of(method(), distance="mse", match_weight=1.0)
    given = batch()
    points = trained.points(given)
    u = torch.zeros_like(points.y).requires_grad_()
    loss, gap = trained.rectification(points, u, given)
    (gradient,) = torch.autograd.grad(loss, u)
    rows = points.times.rows("e2e")
    again = batch()  # its draws
    noise, s = (again.draws.normal("match_noise", (6,))[rows], again.draws.uniform("match_time")[rows])
    x_m = expand(s, noise) * noise + expand(1 - s, noise) * points.y[rows]
    told = given.conditioning.select(rows)
    fake, real = (trained.student(x_m, sign * s, sign * s, told) for sign in (-1, 1))
    apart = (fake - real).clamp(-1, 1)
    assert apart.abs().max() > 1e-3  # the toy is told the sign
    torch.testing.assert_close(gradient[rows], apart.detach() * 2 / 6 / len(rows))
    others = [row for row in range(8) if row not in rows]
    assert not gradient[others].any()
    torch.testing.assert_close(gap, apart.detach().square().mean())


def test_the_twin_learns_the_velocity_to_the_students_own_samples():
    trained, given = method(), batch()
    points = trained.points(given)
    rows, again = points.times.rows("adv"), batch()
    fake_noise, noise = (again.draws.normal(name, (6,))[rows] for name in ("fake_noise", "noise"))
    one = torch.ones(len(rows), dtype=torch.float64)
    fakes = fake_noise - trained.student(fake_noise, one, 0 * one, given.conditioning.select(rows))
    torch.testing.assert_close(points.line[rows], noise - fakes.detach())
    u = torch.zeros_like(points.y)
    target = trained.recursion(points, u, trained.velocity(points))
    torch.testing.assert_close(target[rows], points.line[rows])


def test_the_twins_errors_have_a_weight_of_their_own_and_every_targets_move_is_clipped():
    trained, given = weights_of(method(), adversarial_weight=0.3, target_clamp=1e-3), batch(16)
    points = trained.points(given)
    weights = trained.weights(points, given)
    assert [float(one) == pytest.approx(0.3) for one in weights] == [part == "adv" for part in points.times.part]
    u = torch.ones_like(points.y)
    moved = (u - trained.recursion(points, u, points.line))[points.base].abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-3))


def test_a_targets_own_walk_is_the_slow_copys():
    trained, given = method(config(data="images", target_decay=0.9)), batch(16)
    points, asked = trained.points(given), []
    for name in ("student", "target"):
        trained.roles[name].denoiser.network.register_forward_hook(lambda *_, name=name: asked.append(name))
    trained.recursion(points, torch.zeros_like(points.y), points.line)
    assert set(asked) == {"target"}


@pytest.mark.parametrize(("reference", "answers"), [("student", "target"), ("frozen", "teacher")])
def test_a_student_that_guides_itself_asks_its_slow_copy_and_a_frozen_reference_is_the_teacher(
    reference: str, answers: str
):
    trained, asked = method(config(data="images", target_decay=0.9, reference=reference), guidance_scale=5.0), []
    points = trained.points(batch(16))
    for name, role in trained.roles.items():
        role.single.denoiser.network.register_forward_hook(lambda *_, name=name: asked.append(name))
    trained.velocity(points)
    assert set(asked) == {answers}


def test_guidance_is_added_where_it_is_asked_and_never_to_the_twin():
    trained = method(config(data="images", label_drop=0.0, guidance_t_min=0.2), guidance_scale=5.0)
    assert trained.ratio == pytest.approx(0.8)
    points = trained.points(batch(16))
    found = trained.velocity(points)
    x_t, t = trained.student.own(points.y, points.t)
    conditional, unconditional = trained.guide.pair(x_t, t, points.conditioning)
    for row, part in enumerate(points.times.part):
        on = part != "adv" and 0.2 < points.times.t[row] < 1
        extra = 0.8 * (conditional - unconditional)[row] if on else 0
        torch.testing.assert_close(found[row], (points.line[row] + extra).detach())
    assert method(config(data="images", reference="frozen"), guidance_scale=5.0).ratio == 4.0
    assert method(config(velocity="data"), guidance_scale=5.0).ratio == 0.0  # a guided teacher's own samples


# --- costs, and settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({}, 3.0), ({"data": "images"}, 3.0), ({"image_free": True, "order": 1}, 1.0), ({"order": 0}, 1.0)],
)
def test_a_step_costs_what_it_declares(settings: dict, scale: float):
    trained = method(config(**settings), guidance_scale=scale)
    counter = CallCounter(trained)
    with counter:
        for step in range(6):
            for turn in trained.turns(step, batch(step=step)):
                torch.autograd.backward(*zip(*turn.backward, strict=True), inputs=trained.roles["student"].parameters())
    for step in range(6):
        assert declared(trained, step, batch(step=step)) == counter.calls(step)
        assert counter.wasted(step) == {}


def test_the_targets_decay_grows_as_the_released_code_has_it():
    settings, decay = config(target_decay=0.99), 0.0
    for step in range(50):
        assert settings.target_decay_at(step) == pytest.approx(decay)
        decay += (1 - decay) * (0.99 - decay) / 2
    assert settings.target_decay_at(10**6) == pytest.approx(0.99, abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"velocity": "sideways"}, "--velocity must be one of auto, data, teacher"),
        ({"reference": "nobody"}, "--reference must be one of student, frozen"),
        ({"distance": "far"}, "--distance must be one of barron, mse"),
        ({"weighting": "cube"}, "--weighting must be one of gap, uniform"),
        ({"renoise": "fresh"}, "--renoise follows from --sampler any"),
        ({"order": -1}, "--order must not be negative"),
        ({"parts": []}, "--parts takes a list of e2e, one, any, mul, flow, adv"),
        ({"parts": ["half"]}, "--parts takes a list of"),
        ({"parts": ["adv"]}, "train the twin and nothing that it is the twin of"),
        ({"parts": ["e2e", "any"]}, "rectify by a twin that is never trained"),
        ({"parts": ["any"], "order": 0}, "--order 0 trains the parts mul, flow and adv alone"),
        ({"target_clamp": 0.0}, "--target_clamp must be positive"),
        ({"distance_c": 0.0}, "--distance_c must be positive"),
        ({"distance_alpha": 3.0}, "--distance_alpha must be at most 2"),
        ({"first_step": 0.0}, "--first_step must be between 0 and 1"),
        ({"mul_fraction": 1.0}, "--mul_fraction must be between 0 and 1"),
        ({"label_drop": 1.0}, r"--label_drop must be in \[0, 1\)"),
        ({"target_decay": 1.0}, r"--target_decay must be in \[0, 1\)"),
        ({"guidance_t_min": 0.5, "guidance_t_max": 0.5}, "must be a range"),
        ({"data": "x", "pairs": "y"}, "give --data or --pairs, not both"),
        ({"image_free": True, "data": "x"}, "leave out --data and --pairs"),
        ({"enhanced_ratio": 0.5}, "a teacher has --guidance_scale"),
        ({"reference": "student"}, "--reference student is for --velocity data"),
        ({"data": "x", "enhanced_ratio": 1.0}, "must be below 1 where the student guides itself"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict, message: str):
    with pytest.raises(UserError, match=message) as caught:
        config(**settings)
    assert "\n" not in str(caught.value)


def test_a_ratio_without_guidance_to_take_it_from_is_refused():
    trained = method(config(data="images"))
    trained.guide.further = 0
    with pytest.raises(UserError, match="--enhanced_ratio needs classifier-free guidance"):
        TwinFlow(config(data="images", enhanced_ratio=0.5), trained.roles, trained.guide, trained.sampler)
    assert isinstance(method().points(batch()), Points)
