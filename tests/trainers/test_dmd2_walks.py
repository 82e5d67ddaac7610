"""DMD2's options that change where the student walks: DP-DMD's first step, CDM's times, and the critic's pull."""

from pathlib import Path

import pytest
import torch
from toys import make_loop, roles_that_move, unconditional

from fewstep.critic.first_step import TeacherStart, walk_apart
from fewstep.critic.off_trajectory import OffTrajectory, Walked, place
from fewstep.data.batch import Batch
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.prediction import add_noise, ode_step
from fewstep.diffusion.random_grids import RandomGrid
from fewstep.diffusion.renoising import Renoiser
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import FlowSchedule
from fewstep.diffusion.timesteps import even_grid
from fewstep.errors import UserError
from fewstep.training.method import Pull
from tests.trainers.test_dmd2 import GRID, TABLE, config
from tests.trainers.test_dmd2_relatives import SCHEDULES, batch, every_schedule, method

DIVERSITY = {"diversity_weight": 0.05, "renoise": "ode"}
CDM = {"decoupled": "hybrid", "decoupled_normalizer": "conditional", "normalizer_min": 0.1, "schedule": "random"}
CDM |= {"off_trajectory": 1.0, "critic_follows_student": 0.999, "follow_after": "critic"}


def student_turn(settings: dict, out: Path, schedule: str = "flow", step: int = 0):
    one = method(config(out, **settings), schedule)
    return one, next(one.turns(step, batch(step)))


# --- DP-DMD -----------------------------------------------------------------------------------------------------------


class Affine:
    """x0 of data N(0, s^2) in one family: the exact answer, moved, and scaled by a parameter for each call."""

    def __init__(self, schedule, s: float, factors: torch.Tensor | None = None, mean: float = 0.0) -> None:
        self.schedule, self.s, self.factors, self.mean, self.calls = schedule, s, factors, mean, 0

    def __call__(self, x_t, t, conditioning, end=None):
        alpha, sigma = (v[:, None].to(x_t) for v in self.schedule.coefficients(t))
        x0 = self.mean + alpha * self.s**2 / (alpha**2 * self.s**2 + sigma**2) * x_t
        if self.factors is not None:
            x0 = x0 * self.factors[self.calls]
            self.calls += 1
        return x0


def test_the_match_does_not_reach_the_first_step_and_that_is_reached_by_its_own_term_alone():
    schedule, factors = FlowSchedule(), torch.ones(4, dtype=torch.float64, requires_grad=True)
    student = Affine(schedule, 0.5, factors, mean=1.0)
    noise = torch.randn(3, 2, dtype=torch.float64)
    x0, first = walk_apart(student, Sampler(schedule, GRID, "ode"), noise, unconditional(3))
    assert student.calls == 4
    (through_end,) = torch.autograd.grad(x0, factors, torch.ones_like(x0), retain_graph=True)
    assert through_end[0] == 0
    assert through_end[1:].ne(0).all()
    loss = TeacherStart(student, schedule, (1.0, 0.5)).loss(noise, first, torch.zeros_like(first))
    (through_first,) = torch.autograd.grad(loss, factors)
    assert through_first.ne(0).tolist() == [True, False, False, False]


def test_on_a_gaussian_the_anchor_is_the_exact_mean_velocity_as_its_steps_get_finer():
    """The ODE of N(0, s^2) data scales: x_t = x_1 S(t), S(t)^2 = (1 - t)^2 s^2 + t^2; v* = (1 - S(t)) x_1 / (1 - t)."""
    schedule, s, x = FlowSchedule(), 0.5, torch.randn(5, 2, dtype=torch.float64)
    exact = (1 - (0.25 * s**2 + 0.25) ** 0.5) / 0.5 * x
    errors = []
    for steps in (16, 64, 256):
        times = (*even_grid(steps).tolist(), 0.0)[: steps // 2 + 1]
        start = TeacherStart(Affine(schedule, s), schedule, times)
        errors.append((start.velocity(x, start.end(x, unconditional(5)), unconditional(5)) - exact).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)  # Euler's error
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.2)
    start = TeacherStart(Affine(schedule, s), schedule, (1.0, 0.5, 0.0))  # all of the teacher's steps
    assert start.end(x, unconditional(5)).shape == x.shape


@every_schedule
def test_the_velocity_is_that_of_rectified_flow_in_every_family(schedule: str):
    """A student that says the x0 of the straight line between both ends has no error."""
    chosen, _ = SCHEDULES[schedule]
    times = (1.0, 0.6)
    x, start = torch.randn(4, 6, dtype=torch.float64), TeacherStart(lambda *_a, **_k: None, chosen, times)
    end = torch.randn(4, 6, dtype=torch.float64)
    velocity = start.velocity(x, end, unconditional(4))
    alpha, sigma = (v[0] for v in chosen.coefficients(torch.tensor([1.0], dtype=torch.float64)))
    x0 = x / (alpha + sigma) - sigma / (alpha + sigma) * velocity
    torch.testing.assert_close(start.loss(x, x0, velocity), torch.zeros((), dtype=torch.float64))
    assert start.loss(x, x0 + 1, velocity) > 0.5
    alpha, sigma = (v[0] for v in chosen.coefficients(torch.tensor([0.6], dtype=torch.float64)))
    torch.testing.assert_close(x0 + sigma / (alpha + sigma) * velocity, end / (alpha + sigma))


def test_the_students_turn_follows_the_teacher_and_calls_every_network_as_often_as_it_must(tmp_path: Path):
    one = method(config(tmp_path, **DIVERSITY, diversity_anchor_steps=3, diversity_teacher_steps=6))
    calls = dict.fromkeys(one.roles, 0)
    for name, player in one.roles.items():

        def count(_module, args, _out, name=name) -> None:
            calls[name] += len(args[0])

        player.denoiser.network.register_forward_hook(count)
    turns = one.turns(0, batch(0))
    turn = next(turns)
    assert calls == {"student": 4 * 4, "teacher": 4 * 2 * (3 + 1), "critic": 4}
    assert [gradient is None for _, gradient in turn.backward] == [False, True]
    assert turn.log["student/first_step"] > 0
    next(turns)
    assert calls["student"] == 4 * 4  # the critic sees the same sample


def test_the_normaliser_of_x_t(tmp_path: Path):
    plain, other = (method(config(tmp_path, normalizer=which)) for which in ("x0", "x_t"))
    x0 = torch.randn(4, 6)
    (ours, _), (theirs, _) = (one.matching(x0, batch(0), 1.0) for one in (other, plain))
    ratio = ours / theirs  # one number for each sample
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ratio, torch.ones_like(ratio), rtol=0.05)


# --- CDM --------------------------------------------------------------------------------------------------------------


@every_schedule
def test_a_drawn_grid_is_one_of_its_family_and_the_same_on_every_process(schedule: str):
    chosen, _ = SCHEDULES[schedule]
    law = RandomGrid(chosen, 1.0, 1, 9, 0.25, 0.95)
    grids = [law.draw(Draws(0, step, range(4))) for step in range(200)]
    assert grids == [law.draw(Draws(0, step, range(4, 8))) for step in range(200)]
    for grid in grids:
        Sampler(chosen, grid, "ode")  # refuses one that does not descend
        assert grid[0] == 1.0
        assert all(0.25 - 1e-3 <= t <= 0.95 + 1e-3 for t in grid[1:])
        times = torch.tensor(grid, dtype=torch.float64)
        torch.testing.assert_close(chosen.snap(times), times)
    assert {len(grid) for grid in grids} == set(range(1, 10))
    assert torch.tensor([t for grid in grids for t in grid[1:]]).mean().item() == pytest.approx(0.6, abs=0.03)


@every_schedule
def test_an_extrapolated_point_lies_on_the_line_through_x0_and_the_implied_noise(schedule: str):
    chosen, _ = SCHEDULES[schedule]
    x0, noise, fresh = torch.randn(3, 4, 6, dtype=torch.float64)
    t, s = torch.full((4,), 0.5, dtype=torch.float64), torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64)
    walked = Walked(add_noise(x0, noise, chosen.coefficients(t)), t, x0)
    there = add_noise(x0, noise, chosen.coefficients(s))
    torch.testing.assert_close(place(walked, chosen, "extrapolated", s, None), there)
    torch.testing.assert_close(place(walked, chosen, "point", t, None), walked.x_t)
    torch.testing.assert_close(
        place(walked, chosen, "renoised", s, fresh), add_noise(x0, fresh, chosen.coefficients(s))
    )


def test_for_flows_it_moves_along_the_velocity():
    x_t, x0 = torch.randn(2, 4, 6, dtype=torch.float64)
    t, s = torch.full((4,), 0.5, dtype=torch.float64), torch.full((4,), 0.8, dtype=torch.float64)
    moved = place(Walked(x_t, t, x0), FlowSchedule(), "extrapolated", s, None)
    torch.testing.assert_close(moved, x_t + (0.8 - 0.5) * (x_t - x0) / 0.5)
    coefficients = FlowSchedule().coefficients
    torch.testing.assert_close(moved, ode_step(x_t, x0, coefficients(t), coefficients(s)))


@every_schedule
@pytest.mark.parametrize("where", ["extrapolated", "point", "renoised"])
@pytest.mark.parametrize("teacher_time", ["independent", "student"])
def test_the_student_is_asked_once_more_with_gradient_and_judged_there(
    tmp_path: Path, schedule: str, where: str, teacher_time: str
):
    settings = {**CDM, "off_trajectory_input": where, "off_trajectory_teacher_time": teacher_time}
    _, turn = student_turn(settings, tmp_path, schedule)
    (x0, gradient), (elsewhere, further) = turn.backward
    assert not torch.equal(x0, elsewhere) or where == "point"
    for said, at in ((x0, gradient), (elsewhere, further)):
        assert said.requires_grad
        assert not at.requires_grad
        assert torch.isfinite(at).all()
    assert turn.log["student/off_trajectory"] > 0


def test_judged_at_the_students_own_time_its_answer_is_noised_afresh():
    given, seen = batch(0), []
    x = torch.ones(given.size, 6)
    walked = Walked(x, torch.full((given.size,), 0.6, dtype=torch.float64), torch.zeros_like(x))

    def judge(x_t, t, conditioning, end=None):
        seen.append((x_t, t))
        return x_t

    compared = Renoiser(FlowSchedule(), 0.02, 0.98)
    beside = OffTrajectory(lambda x, t, c: 0.5 * x, judge, judge, compared, "point", "student", 1.0)
    beside(walked, given)
    noise = batch(0).draws.normal("off_trajectory_matching_noise", (6,))
    for x_t, t in seen:
        torch.testing.assert_close(x_t, 0.4 * 0.5 + 0.6 * noise)
        assert torch.equal(t, walked.t)


def test_the_further_match_has_a_weight_of_its_own(tmp_path: Path):
    matched = []
    for weight in (1.0, 0.3):
        one = method(config(tmp_path, **{**CDM, "off_trajectory": weight}), "flow")
        for parameter in one.critic.parameters():
            parameter.data.mul_(1.5)
        matched.append([gradient for _, gradient in next(one.turns(0, batch(0))).backward])
    (own, further), (same, weighed) = matched
    assert further.any()
    torch.testing.assert_close(same, own)
    torch.testing.assert_close(weighed, 0.3 * further)


def test_at_a_point_of_its_walk_the_student_is_asked_again_at_the_same_time(tmp_path: Path):
    settings = {"off_trajectory": 1.0, "off_trajectory_input": "point", "critic_updates": 1}
    one, times = method(config(tmp_path, **settings), "flow"), []
    one.student.denoiser.on_call = lambda _x, t, _early: times.append(t[0].item()) or (lambda _answer: None)
    lasts = set()
    for step in range(12):
        times.clear()
        next(one.turns(step, batch(step)))
        assert times[-1] == times[-2]
        lasts.add(times[-1])
    assert len(lasts) > 1


def test_without_guidance_of_its_own_the_further_match_is_with_the_guided_teacher(tmp_path: Path):
    for how in ("none", "hybrid"):
        one = method(config(tmp_path, off_trajectory=1.0, decoupled=how))
        assert one.sample.off_trajectory.teacher is (one.teacher if how == "none" else one.roles["teacher"])


def test_the_pull_comes_after_whom_it_is_said_to_follow(tmp_path: Path):
    def kinds(**settings) -> list:
        one = method(config(tmp_path, critic_updates=2, critic_follows_student=0.9, **settings))
        turns = [turn for step in (0, 1) for turn in one.turns(step, batch(step))]
        return [turn if isinstance(turn, Pull) else turn.role for turn in turns]

    pull = Pull("critic", "student", 0.9)
    assert kinds() == ["student", pull, "critic", "critic"]
    assert kinds(follow_after="critic") == ["student", "critic", pull, "critic", pull]


# --- all --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "neutral",
    [
        {"critic_follows_student": 1.0},
        {"diversity_weight": 0.0},
        {"schedule": "fixed", "off_trajectory": 0.0},
    ],
)
def test_at_neutral_values_a_run_is_dmd2_to_the_bit(tmp_path: Path, neutral: dict):
    plain, other = (method(config(tmp_path / name, **s)) for name, s in (("plain", {}), ("other", neutral)))
    for one in (plain, other):
        make_loop(one, one.config).run()
    for name, player in plain.roles.items():
        theirs = other.roles[name].state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in player.state_dict().items())


@every_schedule
@pytest.mark.parametrize("settings", [DIVERSITY, CDM, {"critic_follows_student": 0.97}], ids=["dp", "cdm", "ida"])
def test_every_option_trains_both_roles(tmp_path: Path, schedule: str, settings: dict):
    assert roles_that_move(method(config(tmp_path, critic_updates=2, **settings), schedule)) == {"student", "critic"}


@pytest.mark.parametrize("settings", [DIVERSITY, CDM], ids=["dp", "cdm"])
def test_walks_and_terms_of_a_split_batch_are_those_of_the_whole(tmp_path: Path, settings: dict):
    def gradients(parts: list[range]) -> list[torch.Tensor]:
        one = method(config(tmp_path, **settings))
        for indices in parts:
            whole = batch(0, size=4).select(list(indices))
            piece = Batch(len(indices), (6,), whole.conditioning, Draws(0, 0, indices), None, logging=False)
            turn = next(one.turns(0, piece))
            part = len(indices) / 4
            given = [part * (torch.ones_like(t) if g is None else g) for t, g in turn.backward]
            torch.autograd.backward([t for t, _ in turn.backward], given, inputs=one.student.parameters())
        return [p.grad for p in one.student.parameters()]

    for ours, theirs in zip(gradients([range(4)]), gradients([range(2), range(2, 4)]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"diversity_weight": 0.1}, "--renoise ode"),
        ({**DIVERSITY, "steps": 1}, "at least 2"),
        ({"diversity_weight": -1.0}, "diversity_weight"),
        ({**DIVERSITY, "diversity_anchor_steps": 31}, "no more than those"),
        ({**DIVERSITY, "schedule": "random"}, "fixed first step"),
        ({"normalizer": "x1"}, "normalizer"),
        ({"normalizer": "x_t", "decoupled": "hybrid"}, "--normalizer"),
        ({"schedule": "sorted"}, "schedule"),
        ({"schedule_fewest": 4, "schedule_most": 3}, "must be a range"),
        ({"schedule_low": 0.9, "schedule_high": 0.2}, "low < high"),
        ({"off_trajectory": 1.0, "swiftbrush": True}, "--off_trajectory"),
        ({"off_trajectory_input": "anywhere"}, "off_trajectory_input"),
        ({"off_trajectory_teacher_time": "later"}, "off_trajectory_teacher_time"),
        ({"follow_after": "critic"}, "--follow_after belongs"),
        ({"critic_follows_student": 1.5}, "critic_follows_student"),
        ({"critic_follows_student": -0.1}, "critic_follows_student"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_what_to_do(tmp_path: Path, settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        config(tmp_path, **settings)


def test_a_table_of_few_times_gives_shorter_grids():
    grid = RandomGrid(TABLE, 1.0, 28, 28, 0.25, 0.2501).draw(Draws(0, 0, range(2)))
    assert grid == (1.0, 0.25)
