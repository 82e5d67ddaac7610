"""AnyFlow's own class: its stages and their order, its rollouts and their gradient, and its critic."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toys import Asked, labels, make_loop

from fewstep.critic.denoising import critic_denoising
from fewstep.data.batch import Pairs
from fewstep.diffusion.rollout import shortcut
from fewstep.diffusion.timesteps import even_grid
from fewstep.losses.score import distribution_matching
from fewstep.networks.flow_map import SECOND_TIME, gap
from fewstep.programs.planning.dry_run import LongestDraws
from fewstep.trainers.any_flow import AnyFlow
from fewstep.training.method import Renew, Turn
from tests.trainers.toy_any_flow import POLICY, SCHEDULES, Samples, batch, config, method


def own(one, name: str) -> list[Tensor]:
    return one.roles[name].parameters()


def gradients(turn: Turn, parameters: list[Tensor]) -> list[Tensor | None]:
    tensors, given = zip(*turn.backward, strict=True)
    given = [torch.ones_like(t) if g is None else g for t, g in zip(tensors, given, strict=True)]
    return torch.autograd.grad(tensors, parameters, given, allow_unused=True, retain_graph=True)


# --- stages -----------------------------------------------------------------------------------------------------------


def test_the_map_comes_first_and_then_the_student_goes_on_from_its_average():
    one = method(config(max_steps=6, map_steps=4, ema_decay=0.9))
    played = [list(one.turns(step, batch(step=step))) for step in range(6)]
    assert [[turn.role for turn in turns] for turns in played[:4]] == [["student"]] * 4
    assert played[4][0] == Renew("student", like="ema")
    assert [turn.role for turn in played[4][1:]] == [turn.role for turn in played[5]] == ["student", "critic"]
    assert config(max_steps=6).resolved().map_steps == 5  # 5/6 of them
    alone = method(config(max_steps=2, **POLICY))
    assert [turn.role for turn in alone.turns(0, batch())] == ["student", "critic"]


def test_without_an_average_the_optimizer_starts_over_all_the_same():
    assert next(method(config(max_steps=2, map_steps=1)).turns(1, batch())) == Renew("student", like="student")


def test_the_student_that_goes_on_has_the_second_time_of_its_average(tmp_path: Path):
    one = method(config(tmp_path, max_steps=4, map_steps=3, ema_decay=0.9, lr=1e-2))
    loop = make_loop(one, one.config, pairs=Samples(Pairs), name="any_flow")
    for _ in range(3):
        loop.one_step()
    average = float(one.roles["ema"].added[SECOND_TIME].factor)
    assert average != float(one.roles["student"].added[SECOND_TIME].factor) != 1
    one.config.on_policy_lr = 0.0
    loop.one_step()
    for name in ("student", "ema"):
        assert float(one.roles[name].added[SECOND_TIME].factor) == pytest.approx(average, rel=1e-6)


def test_each_stage_has_its_rates(tmp_path: Path):
    settings = config(tmp_path, max_steps=4, map_steps=2, lr=1e-2, on_policy_lr=1e-3, critic_lr=2e-3)
    one = method(settings)
    assert [one.learning_rate_at("student", step) for step in range(4)] == [1e-2, 1e-2, 1e-3, 1e-3]
    assert one.learning_rate("student") == 1e-2 and one.learning_rate_at("critic", 3) == 2e-3
    loop = make_loop(one, one.config, pairs=Samples(Pairs), name="any_flow")
    rates = []
    for _ in range(4):
        loop.one_step()
        rates.append(loop.optimizers["student"].rule.lr)
    assert rates == [1e-2, 1e-2, 1e-3, 1e-3]


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_run_goes_on_where_it_stopped_in_either_stage(stop: int, tmp_path: Path):
    """Bit by bit, also from where one stage ends, with an average and a rate for each stage."""
    states = []
    for out in (tmp_path / "whole", tmp_path / "cut"):
        more = {"max_steps": 6, "map_steps": 3, "lr": 1e-2, "on_policy_lr": 1e-3, "ema_decay": 0.5}
        one = method(config(out, checkpointing_steps=1, checkpoints_total_limit=9, **more))
        if out.name == "cut":
            shutil.copytree(tmp_path / "whole", out)
            for later in range(stop + 1, 7):
                shutil.rmtree(out / "checkpoints" / f"step_{later:08d}")
        loop = make_loop(one, one.config, pairs=Samples(Pairs), name="any_flow")
        if out.name == "cut":
            loop.resume()
            assert loop.step == stop
        loop.run()
        states.append({name: one.roles[name].state_dict() for name in ("student", "critic", "ema")})
    for role, state in states[0].items():
        assert all(torch.equal(value, states[1][role][key]) for key, value in state.items())


def test_micro_batches_add_up_to_their_batch(tmp_path: Path):
    """Whose times are tied depends on the place in the whole batch, and on nothing else."""
    states = []
    for name, more in (("whole", {"batch_size": 8}), ("parts", {"batch_size": 2, "gradient_accumulation_steps": 4})):
        one = method(config(tmp_path / name, max_steps=4, map_steps=2, lr=1e-2, **more))
        make_loop(one, one.config, pairs=Samples(Pairs), name="any_flow").run()
        states.append(one.roles["student"].state_dict())
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], rtol=1e-4, atol=1e-5)


# --- on policy --------------------------------------------------------------------------------------------------------


def test_gradients_reach_the_role_whose_turn_it_is_and_no_other():
    one = method(config(max_steps=2, **POLICY))
    turns = one.turns(0, batch())
    student = next(turns)
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in gradients(student, own(one, "student")))
    assert all(g is None for g in gradients(student, own(one, "critic")))
    critic = next(turns)
    assert all(g is not None and bool(g.any()) for g in gradients(critic, own(one, "critic")))
    assert all(g is None for g in gradients(critic, own(one, "student")))


@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_gradient_passes_through_every_segment_as_by_hand(kind: str, place: int):
    """x <- x - (tau_a - tau_b) u(x, a, b) in rectified flow's coordinates, composed without the project's rollout."""
    one, given = method(config(max_steps=2, rollout_steps=[4], **POLICY), kind), batch()
    grid = shortcut(one.grids[4], place)
    noise = given.draws.normal("noise", (6,))
    walked = one.walk(grid, noise, given)
    ends = [*grid[1:], 0.0]
    alpha, sigma = one.schedule.coefficients(torch.tensor([grid[0]], dtype=torch.float64))
    y = one.sampler.initial_scale * noise / float(alpha + sigma)
    for a, b in zip(grid, ends, strict=True):
        t, r = (torch.full((8,), time, dtype=torch.float64) for time in (a, b))
        alpha, sigma = (c.float()[:, None] for c in one.schedule.coefficients(t))
        u = one.student.velocity((alpha + sigma) * y, t, given.conditioning, r)
        y = y - gap(one.schedule, t, r).float()[:, None] * u
    close = {"rtol": 2e-3, "atol": 1e-3} if kind == "edm" else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(walked, y, **close)
    parameters = own(one, "student")
    found, expected = (torch.autograd.grad(x.square().sum(), parameters) for x in (walked, y))
    for ours, theirs in zip(found, expected, strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("place", "segments", "calls"), [(0, 3, 2), (1, 3, 3), (2, 3, 3), (3, 3, 2), (2, 2, 2), (0, 2, 1), (2, 1, 1)]
)
def test_an_empty_segment_is_not_called(place: int, segments: int, calls: int):
    one, given = method(config(max_steps=2, rollout_steps=[4], **POLICY)), batch()
    asked = Asked(one.roles["student"])
    one.walk(shortcut(one.grids[4], place, segments), given.draws.normal("noise", (6,)), given)
    assert len(asked.times["student", True]) == calls


def test_a_rollout_draws_its_steps_and_its_place_anew_in_each_turn_and_alike_everywhere():
    one = method(config(max_steps=400, steps=8, **POLICY))
    assert list(one.grids) == [2, 4, 8]
    seen = []
    for step in range(200):
        with torch.no_grad():
            for name in ("student", "critic_rollout"):
                grids = []
                for rows in (1, 2):
                    own_grids: list[tuple[float, ...]] = []
                    one.walk = lambda grid, noise, given, kept=own_grids: kept.append(grid) or noise
                    _, rolled = one.rollout(batch(rows, step), name)
                    grids.append((rolled.steps, *own_grids))
                assert grids[0] == grids[1]
                seen.append(grids[0])
    counts = [steps for steps, _ in seen]
    assert {steps: 90 < counts.count(steps) < 180 for steps in (2, 4, 8)} == {2: True, 4: True, 8: True}
    walks = {steps: {grid for n, grid in seen if n == steps} for steps in (2, 4, 8)}
    expected = {n: {shortcut(even_grid(n).tolist(), j) for j in range(n)} for n in (2, 4, 8)}
    assert walks == expected
    assert any(seen[k] != seen[k + 1] for k in range(0, 400, 2))  # the critic's is a rollout of its own


def test_rollouts_walk_the_grids_that_ship_as_a_map_does_whatever_the_plan():
    one = method(config(max_steps=2, rollout_steps=[2, 4], **POLICY))
    plan = replace(one.sampler, renoise="fresh")
    other = AnyFlow(one.config, one.roles, one.teacher, plan, {2: (1.0, 0.3), 8: (1.0,)}, shift=3.0)
    assert other.grids[2] == (1.0, 0.3) and other.grids[4] == pytest.approx((1.0, 0.9, 0.75, 0.5))
    assert sorted(other.grids) == [2, 4]
    noise = batch().draws.normal("noise", (6,))
    assert torch.equal(other.walk((1.0, 0.3), noise, batch()), one.walk((1.0, 0.3), noise, batch()))


def test_teacher_and_critic_are_compared_between_two_times_before_the_shift():
    one = method(config(max_steps=2, time_min=0.2, time_max=0.5, **POLICY), shift=3.0)
    assert one.compared.ends == pytest.approx((3 / 7, 3 / 4))  # 3 t / (1 + 2 t)
    assert one.learnt.ends == pytest.approx((3 / 7, 1))


@pytest.mark.parametrize(
    ("steps", "segments"), [([1], 1), ([2], 2), ([3], 2), ([3], 3), ([5], 3), ([2, 3], 3), ([4, 8], 3), ([4, 8], 2)]
)
def test_what_a_dry_run_draws_is_no_shorter_than_any_rollout(steps: list[int], segments: int):
    one = method(config(max_steps=2, rollout_steps=steps, segments=segments, **POLICY))
    given = replace(batch(), draws=LongestDraws(0, 0, range(8)))
    _, drawn = one.shortcut_drawn(given, "student")
    assert len(drawn) == max(len(shortcut(grid, j, segments)) for grid in one.grids.values() for j in range(len(grid)))


def test_the_students_turns_are_counted_from_the_beginning_of_its_second_stage():
    one = method(config(max_steps=8, map_steps=3, critic_updates=2))
    played = [
        [turn.role for turn in one.turns(step, batch(step=step)) if isinstance(turn, Turn)] for step in range(2, 7)
    ]
    assert played == [["student"], ["student", "critic"], ["critic"], ["student", "critic"], ["critic"]]


def test_the_student_is_matched_without_a_factor_of_a_half_and_weight_zero_leaves_matching_alone():
    one, given = method(config(max_steps=2, map_weight=0.0, matching_weight=0.7, **POLICY), guidance_scale=3.0), batch()
    assert one.config.pairs_wanted is None and not one.config.maps
    turns = one.turns(0, given)
    ((x0, gradient),) = next(turns).backward
    again = batch()
    here = one.compared(x0.detach(), again.draws, "matching")
    with torch.no_grad():
        verdicts = [role(here.x_t, here.t, labels([1.0] * 8, 0.0)) for role in (one.teacher, one.critic)]
    _, half = distribution_matching(x0.detach(), *verdicts, one.config.normalizer_min)
    torch.testing.assert_close(gradient, 2 * 0.7 * half)
    x0 = x0.detach().requires_grad_()
    direction = half * x0.numel()
    loss = 0.7 * (x0 - (x0 - direction).detach()).square().mean()
    torch.testing.assert_close(gradient, torch.autograd.grad(loss, x0)[0])
    assert next(turns).role == "critic"


def test_the_maps_loss_beside_matching_is_that_of_stage_one():
    policy = method(config(max_steps=2, map_weight=0.25, **POLICY))
    (_, _), (loss, gradient) = next(policy.turns(0, batch())).backward
    torch.testing.assert_close(loss, 0.25 * policy.map_loss(batch())[0])
    assert gradient is None


@pytest.mark.parametrize("law", ["logit_normal", "uniform"])
def test_the_critic_has_a_law_of_times_of_its_own(law: str):
    """By default the logit-normal under the same shift, where the student is compared at uniform times."""
    own = {"critic_time_mean": 1.0} if law == "logit_normal" else {}
    one = method(config(max_steps=2, critic_times=law, **own, **POLICY), shift=3.0)
    given = batch(2000)
    t = one.learnt(torch.zeros(2000, 6), given.draws, "critic").t
    u = torch.sigmoid(given_normal(2000) + 1.0) if law == "logit_normal" else torch.rand(2000).double()
    expected = (3 * u / (1 + 2 * u)).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    torch.testing.assert_close(
        t.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)), expected, atol=0.03, rtol=0
    )
    x0, again = torch.randn(8, 6), batch()
    loss, _ = critic_denoising(one.critic, one.roles["teacher"], x0, batch(), one.learnt)
    here = one.learnt(x0, again.draws, "critic")
    error = one.critic.denoiser.raw(here.x_t, here.t, again.conditioning) - (here.noise - x0)
    torch.testing.assert_close(loss, error.square().mean())


def given_normal(count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_a_logged_step_says_how_far_shortcuts_lead_from_every_step():
    one = method(config(max_steps=2, rollout_steps=[1], **POLICY))
    student = next(one.turns(0, batch(logging=True)))
    assert float(student.log["student/shortcut_gap"]) == 0 and float(student.log["student/broken_answers"]) == 0
    one = method(config(max_steps=2, rollout_steps=[8], **POLICY))
    student = next(one.turns(0, batch(logging=True)))
    assert float(student.log["student/shortcut_gap"]) > 0  # an untrained map
    assert "student/shortcut_gap" not in next(one.turns(1, batch(step=1))).log
