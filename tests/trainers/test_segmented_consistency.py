"""Segmented consistency's own class: who learns and when, where jumps end, and what it reduces to."""

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toys import TABLE, every_kind_of_teacher, labels, make_loop

from fewstep.data.batch import Batch
from fewstep.diffusion.discretization import SigmaRange
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import FlowSchedule, NoiseSchedule
from fewstep.errors import UserError
from fewstep.eval.bench.floors import declared
from fewstep.losses.consistency import distance
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.trainers.consistency import Consistency
from fewstep.trainers.segmented_consistency import SegmentedConsistency
from tests.trainers import toy_consistency
from tests.trainers.test_consistency import Numbers, batch, weights
from tests.trainers.toy_segmented import config, vector_method

every_variant = pytest.mark.parametrize("variant", ["tcd", "pcm", "tscd"])
JUDGED = {"tcd": {}, "pcm": {"adversarial_weight": [0.1], "adversarial_lr": 1e-2}, "tscd": {"adversarial_lr": 1e-2}}


def run(method: SegmentedConsistency) -> SegmentedConsistency:
    make_loop(method, method.config, real=Numbers()).run()
    return method


# --- who learns, and what it costs ------------------------------------------------------------------------------------


@every_variant
@every_kind_of_teacher
def test_student_and_heads_learn_and_the_target_follows(
    tmp_path: Path, schedule: NoiseSchedule, kind: str, variant: str
):
    settings = config(tmp_path, variant, ema_decay=0.9, **JUDGED[variant])
    method = vector_method(settings, schedule, kind)
    before = {name: weights(method, name) for name in method.roles}
    run(method)
    moved = {name for name in before if not torch.equal(before[name], weights(method, name))}
    assert moved == {"student", "target", "ema"} | ({"discriminator"} if variant != "tcd" else set())
    assert all(torch.isfinite(weights(method, name)).all() for name in method.roles)


@pytest.mark.parametrize("alternate", [False, True])
def test_each_loss_reaches_its_own_role_alone(tmp_path: Path, alternate: bool):
    settings = config(tmp_path, "tcd", adversarial_weight=[1.0], alternate=alternate)
    method = vector_method(settings)
    turns = [turn for step in range(2) for turn in method.turns(step, batch(step, range(4), real=True))]
    order = ["discriminator", "student"] if alternate else ["student", "discriminator"] * 2
    assert [turn.role for turn in turns] == order
    everyone = {
        name: [p.requires_grad_() for module in one.modules.values() for p in module.parameters()]
        for name, one in method.roles.items()
    }
    for turn in turns:
        ((loss, gradient),) = turn.backward
        assert gradient is None and loss.dim() == 0
        for name, parameters in everyone.items():
            given = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True) if parameters else []
            # The student's passes through the frozen network and its head to the jump, which the loop does not ask of.
            if name == turn.role:
                assert all(g is not None and bool(g.any()) for g in given)
            elif turn.role == "discriminator" or name == "target":
                assert all(g is None for g in given)


def test_the_stages_of_a_run_follow_each_other_with_their_own_weights(tmp_path: Path):
    settings = config(tmp_path, "tscd", steps=8, segments=[8, 4, 2, 1], max_steps=10, stage_steps=[2, 2, 3])
    settings = settings.resolved()
    assert [settings.stage_of(step) for step in range(10)] == [0, 0, 1, 1, 2, 2, 2, 3, 3, 3]
    method = vector_method(settings)
    assert [len(stage.segments) for stage in method.stages] == [8, 4, 2, 1]
    roles = [[turn.role for turn in method.turns(step, batch(step, range(4), real=True))] for step in range(10)]
    assert roles == [["student"]] * 4 + [["student", "discriminator"]] * 6
    log = next(method.turns(8, batch(8, range(4), real=True))).log
    loss = 0.1 * log["student/distance"] + 1.0 * log["student/adversarial"]
    torch.testing.assert_close(log["student/consistency"], loss)


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"solver": "heun", "target_decay": 0.0},
        {"adversarial_weight": [1.0]},
        {"adversarial_weight": [1.0], "alternate": True},
    ],
)
def test_a_step_costs_what_the_method_says(tmp_path: Path, settings: dict, drawn: bool, real: bool):
    settings = {**settings, "data": "numbers" if real else None}
    settings |= {"guidance_min": 2.0, "guidance_max": 4.0} if drawn else {}
    method = vector_method(config(tmp_path, **settings), guidance_scale=3.0)
    counted: dict[str, list[int]] = {}
    for name, one in method.roles.items():

        def note(x_t: Tensor, _t: Tensor, early: bool, name: str = name):
            place = counted.setdefault(f"{name}/features" if early else name, [0, 0])

            def answered(answer: Tensor) -> None:
                place[answer.requires_grad] += len(x_t)

            return answered

        one.denoiser.on_call = note
    for step in range(4):
        counted.clear()
        list(method.turns(step, batch(step, range(4), real)))
        said = declared(method, step, batch(step, range(4), real))
        found = {name: [4 * cost.no_grad, 4 * (cost.to_parameters + cost.to_inputs)] for name, cost in said.items()}
        assert found == counted


def test_micro_batches_and_resumes_change_nothing(tmp_path: Path):
    common = {"max_steps": 8, "ema_decay": 0.9, "checkpointing_steps": 3, "adversarial_lr": 1e-2}

    def made(out: str, **settings) -> SegmentedConsistency:
        return vector_method(config(tmp_path / out, "tscd", **common, **settings))

    whole = run(made("whole", batch_size=8))
    split = run(made("split", batch_size=2, gradient_accumulation_steps=4))
    run(made("parts", batch_size=8))
    shutil.rmtree(max((tmp_path / "parts" / "checkpoints").iterdir()))  # as if it had been killed before the last one
    resumed = made("parts", batch_size=8)
    loop = make_loop(resumed, resumed.config, real=Numbers())
    loop.resume()
    assert 0 < loop.step < 8
    loop.run()
    for name in whole.roles:
        torch.testing.assert_close(weights(split, name), weights(whole, name), rtol=1e-4, atol=1e-6)
        assert torch.equal(weights(resumed, name), weights(whole, name))


# --- times ------------------------------------------------------------------------------------------------------------


@every_variant
@every_kind_of_teacher
def test_jumps_stay_in_their_segment_and_steps_of_the_student_are_trained(
    tmp_path: Path, schedule: NoiseSchedule, kind: str, variant: str
):
    method = vector_method(config(tmp_path, variant), schedule, kind)
    grid = (*method.sampler.grid, SigmaRange(schedule).lowest)
    for number, stage in enumerate(method.stages):
        times = stage.grid.times(0)
        assert set(stage.segments.edges) <= set(times.tolist())
        draws = Draws(0, number, range(300))
        pair = stage.grid.draw(0, draws)
        end = stage.end(schedule, pair, draws)
        edge = stage.segments.lower(pair.t)
        assert bool((edge - 1e-12 <= end).all() and (end <= pair.r + 1e-12).all() and (pair.r < pair.t).all())
        assert bool((stage.segments.upper(pair.t) >= pair.t - 1e-12).all())
        if variant == "pcm":
            assert torch.equal(end, edge)
        else:
            assert bool((end > edge + 1e-6).any())
    last = method.stages[-1]
    assert set(method.sampler.grid) <= set(last.grid.times(0).tolist())
    # No step of the student's walk leaves a segment: with as many phases as steps it goes from edge to edge.
    for t, then in itertools.pairwise(grid):
        assert then >= last.segments.lower(torch.tensor([t])).item() - 1e-9


@pytest.mark.parametrize("schedule", [TABLE, FlowSchedule()], ids=["table", "flow"])
def test_the_target_of_a_neighbour_at_the_edge_is_the_neighbour(tmp_path: Path, schedule: NoiseSchedule):
    kind = "flow" if isinstance(schedule, FlowSchedule) else "epsilon"
    method = vector_method(config(tmp_path, "pcm"), schedule, kind)
    stage, times = method.stages[0], method.stages[0].grid.times(0)
    pair = stage.grid.neighbours(times, torch.arange(len(times) - 1))
    end = stage.end(schedule, pair, Draws(0, 0, [0]))
    size = len(pair.t)
    x0, noise = torch.randn(2, size, 6, generator=torch.Generator().manual_seed(0))
    seen = method.jumps(x0, noise, pair, end, labels([0.0] * size))
    at_edge = pair.r == end
    assert at_edge.sum() == len(stage.segments)
    assert torch.equal(seen.target[at_edge], seen.x_r[at_edge])
    assert not torch.isclose(seen.target[~at_edge], seen.x_r[~at_edge]).all(1).any()
    assert bool(torch.isfinite(seen.target).all() and torch.isfinite(seen.student).all())


# --- what it reduces to -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["tcd", "pcm", "tscd"])
def test_with_one_segment_and_its_end_for_an_end_it_is_the_consistency_loss(tmp_path: Path, variant: str):
    schedule = FlowSchedule()  # whose lowest time is the clean sample, so that a jump there says x0
    common = {"steps": 1, "intervals": [20], "distance": "mse", "target_decay": 0.9}
    method = vector_method(config(tmp_path, variant, segments=[1], ends="edge", offset_noise=0.0, **common))
    settings = toy_consistency.config(tmp_path, "lcm", steps=1, distance="mse", data="numbers", intervals=20)
    plain: Consistency = toy_consistency.vector_method(settings, schedule)
    # Roles that differ, or a target that is the student could hide which of the two is asked.
    for role in ("target", "student"):
        with torch.no_grad():
            for index, parameter in enumerate(method.roles[role].weights.parameters()):
                parameter.add_(0.1 * (index + 1) * (1 if role == "target" else -1))
        plain.roles[role].weights.load_state_dict(method.roles[role].weights.state_dict())
    stage = method.stages[0]
    draws = Draws(0, 0, range(64))
    pair = stage.grid.draw(0, draws)
    x0, noise = draws.normal("x0", (6,)), draws.normal("noise", (6,))
    end = stage.end(schedule, pair, draws)
    assert not bool(end.any())
    seen = method.jumps(x0, noise, pair, end, labels([1.0] * 64))
    theirs = plain.compare(x0, noise, pair, labels([1.0] * 64))
    torch.testing.assert_close(seen.x_r, theirs.x_r, rtol=0, atol=0)
    torch.testing.assert_close(method.distance(seen), distance("mse", theirs.f, theirs.target), rtol=1e-4, atol=1e-6)


def test_jumps_of_one_point_agree_whatever_their_end(tmp_path: Path):
    # All data is one point: teacher and student say it at every time, and every jump is the exact flow.
    class Point:
        def __call__(self, x_t: Tensor, t: Tensor, conditioning, end: Tensor | None = None) -> Tensor:
            return torch.full_like(x_t, 0.7)

    for schedule in (TABLE, FlowSchedule()):
        settings = config(tmp_path, "tscd").resolved()
        stages = settings.make_stages(SigmaRange(schedule), 1.0, [0.25, 0.5, 0.75, 1.0])
        method = SegmentedConsistency(
            settings,
            {"student": Point()},
            GuidedDenoiser(Point(), 1.0, further=0),
            Sampler(schedule, (1.0,), "ode"),
            stages,
        )
        for number, stage in enumerate(stages):
            draws = Draws(0, number, range(50))
            pair = stage.grid.draw(0, draws)
            end = stage.end(schedule, pair, draws)
            x0 = torch.full((50, 6), 0.7, dtype=torch.float64)
            noise = draws.normal("noise", (6,)).double()
            seen = method.jumps(x0, noise, pair, end, labels([0.0] * 50))
            assert float(method.distance(seen).max()) < 1e-20
            alpha, sigma = schedule.coefficients(end)
            exact = alpha[:, None] * x0 + sigma[:, None] * noise
            torch.testing.assert_close(seen.student, exact, rtol=0, atol=1e-10)


# --- noise and guidance -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "common"), [((4, 8, 8), (2, 3)), ((4, 3, 8, 8), (2, 3, 4)), ((64, 4), (1,)), ((6,), ())]
)
def test_offset_noise_is_one_number_for_a_channel_of_a_sample(tmp_path: Path, shape: tuple, common: tuple):
    method = vector_method(config(tmp_path, "tscd", offset_noise=0.5))
    plain = Draws(0, 0, range(200)).normal("noise", shape)
    added = (method.noise(Draws(0, 0, range(200)), shape) - plain) / 0.5
    for axis in common:
        assert float(added.diff(dim=axis).abs().max()) < 1e-5
    channels = 1 if len(shape) >= 3 else -1
    assert float(added.diff(dim=channels).abs().min()) > 0
    assert float(added.std()) == pytest.approx(1.0, abs=0.15)
    assert float(added.flatten(1)[:, 0].diff().abs().min()) > 0
    off = vector_method(config(tmp_path, "tcd"))
    assert torch.equal(off.noise(Draws(0, 0, range(200)), shape), plain)


def test_drawn_guidance_is_the_teachers_alone(tmp_path: Path):
    settings = config(tmp_path, guidance_min=3.0, guidance_max=3.0)
    drawn = vector_method(settings)
    fixed = vector_method(config(tmp_path), guidance_scale=3.0)
    for method in (drawn, fixed):
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in method.teacher.denoiser.weights.parameters():
                parameter.add_(torch.randn_like(parameter))
    one, other = (next(method.turns(0, batch(0, range(4), real=True))).backward[0][0] for method in (drawn, fixed))
    torch.testing.assert_close(one, other)
    off = next(vector_method(config(tmp_path)).turns(0, batch(0, range(4), real=True))).backward[0][0]
    assert not torch.isclose(one, off)


def test_without_data_the_student_learns_on_its_own_samples(tmp_path: Path):
    method = vector_method(config(tmp_path, data=None))
    x0, conditioning = method.samples(batch(0, range(4), real=False))
    assert x0.shape == (4, 6) and not x0.requires_grad
    assert conditioning.batch_size == 4
    real = Batch.real.fget(batch(0, range(4), real=True))
    other = vector_method(config(tmp_path)).samples(batch(0, range(4), real=True))[0]
    assert torch.equal(other, real.x0)


# --- settings ---------------------------------------------------------------------------------------------------------


def test_papers_choices_follow_the_variant_the_steps_and_the_form_of_the_roles(tmp_path: Path):
    tscd = config(tmp_path, "tscd", steps=8, segments=[8, 4, 2, 1], max_steps=400).resolved()
    assert (tscd.adversarial_weight, tscd.stage_steps) == ([0.0, 0.0, 0.1, 1.0], [100, 100, 100])
    assert (tscd.target_decay, tscd.renoise, tscd.walk_gamma) == (0.95, "auto", 0.3)
    assert config(tmp_path, "tscd", segments=[2, 1]).resolved().adversarial_weight == [0.1, 1.0]
    pcm = config(tmp_path, "pcm").resolved()
    assert (pcm.segments, pcm.ends, pcm.renoise, pcm.walk_gamma, pcm.alternate) == ([4], "edge", "ode", None, True)
    assert config(tmp_path, "tcd", lora_rank=4).resolved().target_decay == 0.0
    longer = config(tmp_path, "tscd", stage_steps=tscd.stage_steps[:2], max_steps=4000).resolved()
    assert longer.stage_of(250) == 2  # a run that goes on for longer has the stages that it had


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "ctm"}, "--variant must be one of tcd, pcm, tscd"),
        ({"variant": "pcm", "intervals": [50]}, "50 intervals cannot be divided into 4 segments; take 48"),
        ({"variant": "tscd", "segments": [4, 2, 1], "intervals": [40, 20, 0]}, "more than the 0 intervals"),
        ({"variant": "tscd", "segments": [1, 2, 4]}, r"--segments go from many to few, such as \[8,4,2,1\]"),
        ({"variant": "tscd", "segments": [4, 4, 1]}, "from many to few"),
        ({"segments": []}, "from many to few"),
        ({"segments": [8], "intervals": [4]}, "8 segments are more than the 4 intervals"),
        ({"segments": [8], "intervals": [40]}, "--segments end at 8, which do not divide --steps 4"),
        ({"variant": "pcm", "segments": [2]}, "makes 2 steps, and not --steps 4"),
        ({"variant": "pcm", "renoise": "tcd"}, "beyond a segment's end: take --renoise ode"),
        ({"renoise": "fresh"}, "--renoise must be one of auto, ode, tcd"),
        ({"gamma": 0.0}, r"--gamma must be in \(0, 1\], not 0.0; --renoise ode draws no noise"),
        ({"target_decay": 1.0}, "--target_decay"),
        ({"ends": "zero"}, "--ends must be one of edge, random"),
        ({"solver": "rk4"}, "--solver"),
        ({"distance": "lpips"}, "--distance"),
        ({"adversarial_loss": "wgan"}, "--adversarial_loss"),
        ({"huber_c": -1.0}, "huber_c"),
        ({"guidance_min": 2.0}, "must be a range"),
        ({"distance_weight": [0.0]}, "both 0 in a stage"),
        ({"distance_weight": [1.0, 1.0]}, "must be one number, or one for each of --segments"),
        ({"variant": "tscd", "max_steps": 2}, "end before the last of 3 stages begins"),
        ({"variant": "tscd", "stage_steps": [2]}, "must be the steps of each of 3 stages but the last"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(tmp_path: Path, settings: dict, message: str):
    with pytest.raises(UserError, match=message) as caught:
        config(tmp_path, **{"variant": "tcd", **settings})
    assert "\n" not in str(caught.value)


def test_a_grid_finer_than_its_table_is_refused(tmp_path: Path):
    settings = config(tmp_path, "tcd", intervals=[1500]).resolved()
    with pytest.raises(UserError, match="--intervals 1500 are more than the times of the teacher's table; take 999"):
        settings.make_stages(SigmaRange(TABLE), 1.0, [1.0])
    (stage,) = settings.make_stages(SigmaRange(FlowSchedule()), 1.0, [1.0])
    assert len(stage.grid.times(0)) == 1501
