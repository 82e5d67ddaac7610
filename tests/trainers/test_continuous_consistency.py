"""Continuous-time consistency's own class on small real networks: who learns what, in which order, at what cost."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toys import TABLE, Labels, every_kind_of_teacher, labels, make_loop

from fewstep.data.batch import Pairs, Real
from fewstep.diffusion.discretization import SigmaRange, ect_mapping
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, NoiseSchedule
from fewstep.errors import UserError
from fewstep.eval.bench.floors import declared
from fewstep.losses.consistency import distance
from fewstep.networks.log_variance import LOG_VARIANCE
from fewstep.networks.trig_flow import DERIVATIVES
from fewstep.programs.planning.call_counts import CallCounter
from fewstep.trainers.consistency import Consistency, ConsistencyConfig
from fewstep.trainers.continuous_consistency import ContinuousConsistency
from tests.trainers.toy_continuous import Numbers, batch, config, vector_method

MATCHING = {"matching_first_step": 0, "critic_updates": 2, "tangent_warmup": 0}
every_variant = pytest.mark.parametrize(
    "settings",
    [
        {},
        {"velocity": "data", "data": "numbers"},
        {"variant": "rcm", **MATCHING},
        {"variant": "tcm", "transition": 0.5, "gap": 0.1},
    ],
    ids=["scm", "scm from data", "rcm", "tcm"],
)


def run(method: ContinuousConsistency) -> dict[str, Tensor]:
    """Train, and give back the weights of each role."""
    data = {"real": Numbers(Real)} if method.config.data else {"pairs": Numbers(Pairs)}
    make_loop(method, method.config, conditions=Labels(), **data).run()
    return weights(method)


def weights(method: ContinuousConsistency) -> dict[str, Tensor]:
    states = {name: role.state_dict().values() for name, role in method.roles.items()}
    return {name: torch.cat([value.flatten() for value in state]) for name, state in states.items()}


def gradients(method: ContinuousConsistency, step: int = 0, rows: range = range(8)) -> list[Tensor]:
    """Of the network that learns in a step."""
    (turn,) = method.turns(step, batch(step, rows))
    learners = [p for name, p in method.roles[turn.role].named_parameters() if name.startswith("network")]
    tensors, given = zip(*turn.backward, strict=True)
    torch.autograd.backward(tensors, given, inputs=learners)
    found = [p.grad for p in learners]
    for p in learners:
        p.grad = None
    return found


# --- who learns, and what it costs ------------------------------------------------------------------------------------


@every_variant
@every_kind_of_teacher
def test_only_student_and_critic_learn(tmp_path: Path, schedule: NoiseSchedule, kind: str, settings: dict):
    method = vector_method(config(out=str(tmp_path), ema_decay=0.5, **settings), schedule, kind)
    before = weights(method)
    after = run(method)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"student", "ema", "critic"} & set(method.roles)
    assert all(torch.isfinite(value).all() for value in after.values())


def test_the_critic_learns_between_the_students_updates_once_matching_has_begun():
    method = vector_method(config("rcm", matching_first_step=3, critic_updates=2))
    order = [[turn.role for turn in method.turns(step, batch(step))] for step in range(10)]
    assert order == [["student"]] * 4 + [["critic"]] * 2 + [["student"]] + [["critic"]] * 2 + [["student"]]
    pieces = [len(next(method.turns(step, batch(step))).backward) for step in (0, 2, 3, 6)]
    assert pieces == [1, 1, 2, 2]  # the consistency alone, and then both


def test_each_terms_gradient_reaches_its_own_role_alone():
    method = vector_method(config("rcm", **MATCHING))
    everything = {name: role.weights.requires_grad_() for name, role in method.roles.items()}
    for step, learner in ((0, "student"), (1, "critic")):
        turn = next(method.turns(step, batch(step)))
        assert turn.role == learner
        for tensor, gradient in turn.backward:
            for name, weights in everything.items():
                found = torch.autograd.grad(
                    tensor, list(weights.parameters()), gradient, retain_graph=True, allow_unused=True
                )
                assert all((g is not None) == (name == learner) for g in found), (step, name)


@pytest.mark.parametrize("derivative", DERIVATIVES)
@every_variant
def test_a_step_costs_what_it_declares(settings: dict, derivative: str):
    if settings.get("variant") == "tcm" and derivative != "exact":
        pytest.skip("TCM takes none")
    method = vector_method(config(derivative=derivative, **settings), guidance_scale=3.0)
    with CallCounter(method) as counter:
        for step in range(4):
            for turn in method.turns(step, batch(step)):
                learners = method.roles[turn.role].parameters()
                torch.autograd.backward(*zip(*turn.backward, strict=True), inputs=learners)
    for step in range(4):
        assert declared(method, step, batch(step)) == counter.calls(step)
        assert counter.wasted(step) == {}


@every_variant
def test_a_batch_learns_what_its_micro_batches_do(settings: dict):
    method = vector_method(config(**settings))
    for step in (0, 1):
        parts = [gradients(method, step, range(start, start + 2)) for start in (0, 2, 4, 6)]
        for whole, *split in zip(gradients(method, step), *parts, strict=True):
            torch.testing.assert_close(torch.stack(split).mean(0), whole, rtol=1e-4, atol=1e-6)


# --- rCM ----------------------------------------------------------------------------------------------------------


def test_rcm_without_matching_is_scm():
    alike = {"tangent_warmup": 0, "tangent_normalization": "norm", "weighting": "uniform", "log_variance": False}
    levels = {"level_mean": 0.7, "level_std": 1.6, "consistency_weight": 1.0}
    scm, rcm = (vector_method(config(name, **alike, **levels, matching_weight=0.0)) for name in ("scm", "rcm"))
    assert "critic" not in rcm.roles
    for a, b in zip(gradients(scm), gradients(rcm), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_the_match_is_weighed_without_a_factor_of_one_half():
    method = vector_method(config("rcm", matching_weight=0.3, **MATCHING))
    with torch.no_grad():  # which is the teacher at first
        for parameter in method.critic.parameters():
            parameter.mul_(1.5)
    x0, gradient = next(method.turns(0, batch(0))).backward[1]
    expected, _ = method.matching(x0.detach(), batch(0))
    assert gradient is not None and bool(gradient.any())
    torch.testing.assert_close(gradient, 2 * 0.3 * expected)


def test_a_rollout_begins_where_the_sampler_does():
    method, met = vector_method(config("rcm", **MATCHING), EDMSchedule(), "edm"), []
    method.student.denoiser.on_call = lambda x, _t, _early: met.append(x) or (lambda _answer: None)
    method.sample(batch(0))
    torch.testing.assert_close(met[0], EDMSchedule().initial_scale() * batch(0).draws.normal("sample_noise", (6,)))


def test_a_rollout_meets_ever_cleaner_times_and_learns_at_the_last_alone():
    method = vector_method(config("rcm", **MATCHING))
    method.sampler = replace(method.sampler, grid=(1.0, 0.75, 0.5, 0.25))
    seen: list[tuple[Tensor, bool]] = []
    method.student.denoiser.on_call = lambda _x, t, _early: (
        seen.append((t, torch.is_grad_enabled())) or (lambda _answer: None)
    )
    for step in range(40):
        seen.clear()
        x0 = method.sample(batch(step))
        assert x0.requires_grad and [grad for _, grad in seen] == [False] * (len(seen) - 1) + [True]
        times = torch.stack([t for t, _ in seen])
        drawn = [method.compared.times(batch(step).draws, f"step_{k}") for k in range(1, len(seen))]
        assert torch.equal(times, torch.stack([torch.ones(8).double(), *drawn]).cummin(0).values)
        assert len(seen) == 1 + batch(step).draws.shared_integer("student_step", 0, 4)


# --- TCM ----------------------------------------------------------------------------------------------------------


@every_kind_of_teacher
def test_a_truncated_model_with_its_transition_at_the_clean_end_is_one_of_a_single_stage(
    schedule: NoiseSchedule, kind: str
):
    lowest = 2e-2 if schedule is TABLE else 1e-6
    truncated = vector_method(config("tcm", transition=lowest, boundary_share=0.0), schedule, kind)
    given = batch(0)
    pair, boundary = truncated.times.draw(given.draws)
    assert boundary == []
    noise = given.draws.normal("noise", (6,))
    each = truncated.compare(given.real.x0, noise, pair, [], given.conditioning)
    settings = ConsistencyConfig(teacher="t", out="o", data="d", variant="ect", distance="l2_norm").resolved()
    levels, sampler = SigmaRange(schedule), Sampler(schedule, (1.0,), "fresh")
    one = Consistency(settings, truncated.roles | {"target": truncated.student}, None, sampler, None, None)
    one.boundary = settings.make_boundary(levels, None)
    seen = one.compare(given.real.x0, noise, pair, given.conditioning)
    torch.testing.assert_close(each, distance("l2_norm", seen.f, seen.target) / (pair.sigma_t - pair.sigma_r).float())


@pytest.mark.parametrize("schedule", [FlowSchedule(), TABLE, EDMSchedule()], ids=["flow", "table", "edm"])
def test_truncated_times_lie_above_the_transition_and_a_share_of_them_at_it(schedule: NoiseSchedule):
    method = vector_method(config("tcm", transition=0.7, boundary_share=0.3, gap=1e-2), schedule)
    pair, boundary = method.times.draw(batch(0, range(400)).draws)
    assert len(boundary) == 120
    others = torch.tensor(sorted(set(range(400)) - set(boundary)))
    entry = 1e-2 if schedule is TABLE else 1e-7
    assert float(pair.sigma_t.min()) >= 0.7 * (1 - entry)
    assert float(pair.sigma_r[others].min()) >= 0.7 * (1 - entry)
    torch.testing.assert_close(pair.sigma_t[boundary], torch.full((120,), 0.7).double(), rtol=entry, atol=0)
    assert float(pair.sigma_r[boundary].max()) < 0.7
    if schedule is not TABLE:
        torch.testing.assert_close(pair.sigma_r, ect_mapping(pair.sigma_t, 1e-2), rtol=1e-6, atol=0)
    # In micro-batches it is the same samples.
    parts = [method.times.boundary(range(start, start + 8)) for start in range(0, 400, 8)]
    assert [8 * k + row for k, rows in enumerate(parts) for row in rows] == boundary


def test_the_target_at_the_transition_is_the_first_stages_and_elsewhere_the_students():
    method = vector_method(config("tcm", transition=0.5))
    for parameter in method.roles["target"].weights.parameters():
        parameter.data.add_(1.0)
    given = batch(0)
    pair, boundary = method.times.draw(given.draws)
    noise = given.draws.normal("noise", (6,))
    x0, told = given.real.x0, given.conditioning
    each = method.compare(x0, noise, pair, boundary, told)
    alone = [method.compare(x0, noise, pair, rows, told) for rows in ([], list(range(8)))]
    for row in range(8):
        assert float(each[row].detach()) == pytest.approx(float(alone[row in boundary][row].detach()), rel=1e-5)
    assert len(boundary) == 2
    loss, _ = method.truncated(batch(0))
    at = torch.tensor([row in boundary for row in range(8)])
    torch.testing.assert_close(loss, each[~at].mean() + 0.1 * each[at].mean(), rtol=1e-5, atol=0)


# --- sCM's weights ------------------------------------------------------------------------------------------------


def test_a_log_variance_learns_the_logarithm_of_the_loss():
    method = vector_method(config(level_mean=1.0, level_std=1e-3, tangent_warmup=0, derivative="discrete"))
    head = method.student.added[LOG_VARIANCE]
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-2)
    for step in range(60):
        loss, _ = method.continuous(step, batch(step, range(16)))
        optimizer.zero_grad()
        loss.backward(inputs=list(head.parameters()))
        optimizer.step()
    (said,) = method.student.added.pop(LOG_VARIANCE)(torch.ones(1, dtype=torch.float64)).tolist()
    losses = torch.stack([method.continuous(0, batch(step, range(64)))[0].detach() for step in range(8)])
    assert said == pytest.approx(losses.mean().log().item(), abs=0.2) and abs(said) > 0.5


def test_trajectories_are_the_guided_teachers_or_the_datas():
    method = vector_method(config(), guidance_scale=3.0)
    at = method.point(batch(0))
    teacher, trig = method.roles["teacher"].denoiser, method.trig
    raw = [teacher.raw(at.x_t, at.t, told) for told in (at.conditioning, labels([5.0] * 8))]
    guided = raw[1] + 3 * (raw[0] - raw[1])
    torch.testing.assert_close(at.direction, trig.output(guided, "flow", at.x_t, at.t))
    for schedule, kind, deviation in ((FlowSchedule(), "flow", 1.0), (EDMSchedule(), "edm", 0.5)):
        given = batch(0)
        method = vector_method(config(velocity="data", data="numbers"), schedule, kind)
        own = method.point(given)
        angle, z, x0 = method.trig.angle(own.t).float()[:, None], batch(0).draws.normal("noise", (6,)), given.real.x0
        # Of y = cos x0 + sin sigma_d z by the angle.
        expected = angle.cos() * deviation * z - angle.sin() * x0
        torch.testing.assert_close(own.direction, expected, rtol=1e-4, atol=1e-4, check_dtype=False)


# --- what cannot work ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "first", "follows"),
    [({}, 500, True), ({"max_steps": 9000}, 1000, False), ({"matching_first_step": 7}, 7, False)],
)
def test_matching_begins_within_the_run(settings: dict, first: int, follows: bool):
    """At the end of the warm-up of 1000 steps, or half way through a shorter run, of 1000 by default."""
    told = ContinuousConsistency.Config(teacher="t", out="o", variant="rcm", **settings)
    assert (told.resolved().matching_first_step, told.follows_max_steps) == (first, follows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "ctm"}, "--variant must be one of scm, rcm, tcm"),
        ({"velocity": "data"}, "--velocity data trains on real images: give --data"),
        ({"variant": "tcm", "data": None}, "--variant tcm trains on real images: give --data"),
        ({"variant": "tcm", "init": None}, "--variant tcm is a second stage: give --init"),
        ({"variant": "rcm", "velocity": "data", "data": "x"}, "leave out --velocity data"),
        ({"variant": "rcm", "matching_first_step": 7, "max_steps": 7}, "begins to match at step 7"),
        ({"matching_weight": 1.0}, "--matching_weight belongs to --variant rcm"),
        ({"matching_first_step": 5}, "leave out --matching_first_step: it belongs to --variant rcm"),
        ({"variant": "tcm", "velocity": "data"}, "leave out --velocity: it belongs to --variant scm or rcm"),
        ({"weighting": "1/(t-r)"}, "needs two times"),
        ({"derivative": "guess"}, "--derivative must be one of"),
        ({"tangent_normalization": "l1"}, "--tangent_normalization must be one of"),
        ({"derivative_step": 0.0}, "--derivative_step must be positive"),
        ({"derivative_step": 3.0}, "--derivative_step is an angle below pi/2"),
        ({"tangent_constant": 0.0}, "--tangent_constant must be positive"),  # a student that is its teacher has none
        ({"boundary_share": 1.0}, r"--boundary_share must be in \[0, 1\)"),
        ({"data": "x", "pairs": "y"}, "give --data or --pairs, not both"),
        ({"renoise": "ode"}, "--renoise ode does not sample a consistency model"),
        ({"sigma_data": -1.0}, "--sigma_data must be positive"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        config(**settings)


def test_a_transition_below_a_tables_second_entry_is_refused():
    with pytest.raises(UserError, match="--transition must be at least"):
        vector_method(config("tcm", transition=1e-3), TABLE, "epsilon")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"transition": 5.0}, "last step begins at the noise level 3, below --transition 5"),
        ({"transition": 100.0, "steps": 1}, "leaves no noise levels to train at"),
    ],
)
def test_a_student_that_would_be_sampled_where_it_is_not_trained_is_refused(settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        vector_method(config("tcm", **settings))
