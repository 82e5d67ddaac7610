"""Decoupled DMD, f-distill and SwiftBrush, as options of DMD2's class: what they change, and where they are DMD2."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_pipelines import tiny_ddim
from torch import Tensor
from toys import Labels, TinyNetwork, labels, make_loop, role

from fewstep.data.batch import Batch
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.renoising import Renoiser
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule
from fewstep.errors import UserError
from fewstep.eval.bench.floors import declared
from fewstep.losses.divergence import DIVERGENCES, DivergenceWeight
from fewstep.losses.score import decoupled_matching, distribution_matching
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.programs.distillation import distill
from fewstep.programs.planning.call_counts import Calls
from fewstep.trainers.dmd2 import Dmd2, Dmd2Config
from tests.checkpoints import load_latest
from tests.trainers.test_dmd2 import GRID, TABLE, Pictures, config, gan_method

SCHEDULES = {"table": (TABLE, "epsilon"), "flow": (FlowSchedule(), "flow"), "edm": (EDMSchedule(), "edm")}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def method(settings: Dmd2Config, schedule: str = "flow", shift: float = 1.0, scale: float = 3.0) -> Dmd2:
    """DMD2 over vectors of 6, its teacher guided, its critic another network."""
    chosen, kind = SCHEDULES[schedule]
    roles = {}
    for seed, name in enumerate(("teacher", "student", "critic")):
        torch.manual_seed(seed)
        roles[name] = role(name, TinyNetwork(6), chosen, kind, trainable=name != "teacher")
    guided = GuidedDenoiser(roles["teacher"], scale)
    return Dmd2(settings, roles, guided, Sampler(chosen, GRID, "ode", chosen.initial_scale()), shift=shift)


def batch(step: int, draws: type[Draws] = Draws, size: int = 4) -> Batch:
    indices = range(size)
    return Batch(size, (6,), Labels(null=0.0).batch(0, list(indices)), draws(0, step, indices), None, logging=False)


class OnePlace(Draws):
    """Draws in which both terms of Decoupled DMD look at one noised sample."""

    def _generators(self, name: str) -> Iterator[torch.Generator]:
        self._names.clear()
        return super()._generators(name.replace("guidance_", "matching_"))


# --- Decoupled DMD ----------------------------------------------------------------------------------------------------


@every_schedule
def test_in_one_place_decoupled_is_dmd2(tmp_path: Path, schedule: str):
    coupled, decoupled = (method(config(tmp_path, decoupled=how), schedule) for how in ("none", "full"))
    x0 = torch.randn(4, 6)
    expected, _ = coupled.matching(x0, batch(0, OnePlace), 1.0)
    gradient, _ = decoupled.matching(x0, batch(0, OnePlace), 1.0)
    # The one guides raw outputs and the other x0, which differ by roundings of numbers as large as an EDM's noise.
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    apart, _ = decoupled.matching(x0, batch(0), 1.0)
    assert not torch.allclose(apart, expected, rtol=0.1)


def test_without_guidance_no_augmentation_is_left():
    x0, positive, critic, negative, elsewhere = torch.randn(5, 4, 3, 5, dtype=torch.float64)
    ours = decoupled_matching(x0, (positive, critic), (elsewhere, negative), 1.0, (positive, elsewhere))
    torch.testing.assert_close(ours, distribution_matching(x0, positive, critic))


def test_what_guidance_adds_is_linear_in_it_and_knows_no_critic():
    x0, positive, critic, negative, elsewhere = torch.randn(5, 4, 3, 5, dtype=torch.float64)

    def gradient(w: float, critic: Tensor = critic) -> Tensor:
        terms = (positive, critic), (elsewhere, negative)
        return decoupled_matching(x0, *terms, w, (positive, elsewhere)).gradient

    torch.testing.assert_close(gradient(5.0) - gradient(1.0), 4 * (gradient(2.0) - gradient(1.0)))
    other = critic + 1
    torch.testing.assert_close(gradient(5.0) - gradient(1.0), gradient(5.0, other) - gradient(1.0, other))
    # Along x0_negative - x0_positive: descent leads towards the condition.
    assert ((gradient(2.0) - gradient(1.0)) * (elsewhere - negative)).sum() < 0


@every_schedule
@pytest.mark.parametrize("how", ["hybrid", "full", "constrained"])
def test_the_times_of_both_terms(tmp_path: Path, how: str, schedule: str):
    shift = 3.0 if schedule == "flow" else 1.0
    one = method(config(tmp_path, decoupled=how), schedule, shift)
    seen: dict[str, list[Tensor]] = {"matching": [], "guidance": []}
    times = Renoiser.times

    def noted(self: Renoiser, draws: Draws, name: str) -> Tensor:
        t = times(self, draws, name)
        if name in seen:
            seen[name].append(t)
        return t

    for called_at in GRID:
        for found in seen.values():
            found.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Renoiser, "times", noted)
            for step in range(5):
                one.matching(torch.randn(16, 6), batch(step, size=16), called_at)
        here, there = (torch.cat(found) for found in seen.values())
        assert (here.max() <= called_at) == (how == "constrained" or called_at == 1.0)
        assert (there.max() <= called_at) == (how != "full" or called_at == 1.0)
        assert min(here.min(), there.min()) >= 0.02
        assert not torch.equal(here, there)
        if how != "full":  # up to where the student was called, not only close to the data
            assert there.max() > 0.8 * min(called_at, 0.98)


@pytest.mark.parametrize(("normalizer", "asked"), [("guided", 4), ("conditional", 3)])
def test_a_step_costs_what_it_says(tmp_path: Path, normalizer: str, asked: int):
    one = method(config(tmp_path, decoupled="hybrid", decoupled_normalizer=normalizer, critic_updates=2))
    rows: Counter[str] = Counter()
    for name, player in one.roles.items():
        network = player.denoiser.network
        network.register_forward_pre_hook(lambda _, args, name=name: rows.update({name: len(args[0])}))
    list(one.turns(0, batch(0)))
    cost = declared(one, 0, batch(0))
    assert cost["teacher"] == Calls(no_grad=asked)
    assert {name: c.no_grad + c.to_parameters for name, c in cost.items()} == {n: r / 4 for n, r in rows.items()}


def test_the_command_refuses_a_teacher_that_cannot_be_guided(tmp_path: Path):
    settings = {"steps": 1, "out": str(tmp_path / "run"), "decoupled": "hybrid", "cpu": True, "report_to": "none"}
    with pytest.raises(UserError, match="Decoupled DMD trains on the teacher's response to guidance"):
        distill(tiny_ddim(), "dmd2", **settings)


# --- f-distill --------------------------------------------------------------------------------------------------------


def test_each_weight_is_that_of_its_divergence():
    """h(rho) = rho^2 f''(rho), by automatic differentiation of f."""
    functions = {
        "rkl": lambda r: -r.log(),
        "kl": lambda r: r * r.log(),
        "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
        "sf": lambda r: (1 + r) * ((1 + r) / r).log(),
        "sh": lambda r: -4 * r.sqrt(),
        "neyman": lambda r: (1 - r) ** 2 / r / 2,
        "jf": lambda r: (r - 1) * r.log(),
    }
    rho = torch.linspace(0.1, 5, 20, dtype=torch.float64, requires_grad=True)
    for name, f in functions.items():
        (slope,) = torch.autograd.grad(f(rho).sum(), rho, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), rho)
        torch.testing.assert_close(DIVERGENCES[name](rho), rho**2 * curvature)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_logits_give_dmd2_and_reverse_kl_always_does(divergence: str):
    t = torch.rand(6, dtype=torch.float64)
    weigh = DivergenceWeight(divergence)
    torch.testing.assert_close(weigh(torch.full((6,), 0.7), t), torch.ones(6).double(), rtol=1e-5, atol=0)
    apart = weigh(torch.randn(6), t)
    assert torch.allclose(apart, torch.ones(6).double(), rtol=1e-5) == (divergence == "rkl")


def test_bins_forget_what_a_time_has_in_common():
    """Where all samples of one time look equally fake, none of them is weighed down."""
    weigh = DivergenceWeight("kl", bins=2)
    t = torch.tensor([0.1, 0.2, 0.8, 0.9], dtype=torch.float64)
    weights = weigh(torch.tensor([-1.0, -1.0, 2.0, 2.0]), t)
    torch.testing.assert_close(weights, torch.ones(4).double(), rtol=1e-5, atol=0)
    slow = DivergenceWeight("kl", bins=2, momentum=0.5)
    slow(torch.zeros(2), torch.tensor([0.1, 0.2]))
    torch.testing.assert_close(slow.bins, torch.tensor([1.0, 1.0]).double(), rtol=1e-5, atol=0)
    slow(torch.full((2,), 3.0).log(), torch.tensor([0.1, 0.2]))
    torch.testing.assert_close(
        slow.bins, torch.tensor([2.0, 1.0]).double(), rtol=1e-5, atol=0
    )  # the other is untouched


def f_run(out: Path, **settings) -> Dmd2:
    settings = {"f_divergence": "js", "data": "pictures", "critic_updates": 2, **settings}
    one = gan_method(config(out, **settings))
    make_loop(one, one.config, (1, 8, 8), conditions=Labels(None), real=Pictures()).run()
    return one


def test_reverse_kl_trains_as_dmd2_with_the_same_gan(tmp_path: Path):
    dmd2 = f_run(tmp_path / "dmd2", f_divergence="none", gan_weight=0.1).student.state_dict()
    rkl = f_run(tmp_path / "rkl", f_divergence="rkl", gan_weight=0.1).student.state_dict()
    torch.testing.assert_close(rkl, dmd2, rtol=1e-4, atol=1e-5)


def test_the_heads_verdict_weighs_the_samples(tmp_path: Path):
    one = f_run(tmp_path, max_steps=1, f_divergence="kl")
    logits = torch.tensor([-1.0, 0.0, 0.5, 2.0])
    one.critic.added["head"].forward = lambda features: logits
    x0, (there,) = torch.randn(4, 1, 8, 8), [Draws(0, 7, range(4))]
    given = Batch(4, (1, 8, 8), Labels(None).batch(0, range(4)), there, None, logging=False)
    weighed, _ = one.matching(x0, given, 1.0)
    del one.critic.added["divergence"]
    given.draws._names.clear()
    plain, _ = one.matching(x0, given, 1.0)
    ratio = (weighed / plain).flatten(1)
    expected = logits.exp() / logits.exp().mean()
    torch.testing.assert_close(ratio, expected[:, None].expand_as(ratio), rtol=1e-4, atol=0)


def test_the_bins_are_resumed(tmp_path: Path):
    settings = {"f_bins": 4, "f_momentum": 0.5, "checkpointing_steps": 2, "max_steps": 4}
    whole = f_run(tmp_path / "whole", **settings)
    assert (whole.critic.added["divergence"].bins != 1).any()
    f_run(tmp_path / "parts", **{**settings, "max_steps": 2})
    again = gan_method(config(tmp_path / "parts", f_divergence="js", data="pictures", critic_updates=2, **settings))
    loop = make_loop(again, again.config, (1, 8, 8), conditions=Labels(None), real=Pictures())
    loop.resume()
    loop.run()
    _, ours = load_latest(tmp_path / "parts" / "checkpoints")
    _, theirs = load_latest(tmp_path / "whole" / "checkpoints")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert "divergence.bins" in ours["critic"]


# --- SwiftBrush -------------------------------------------------------------------------------------------------------


@every_schedule
def test_swiftbrush_weighs_the_difference_of_two_guided_noises(tmp_path: Path, schedule: str):
    one = method(config(tmp_path, swiftbrush=True), schedule)
    x0, given = torch.randn(4, 6), batch(0)
    gradient, _ = one.matching(x0, given, 1.0)
    given.draws._names.clear()
    x_t, t, _ = one.compared(x0, given.draws, "matching")
    alpha, sigma = (c.float().reshape(-1, 1) for c in one.compared.schedule.coefficients(t))
    both = one.teacher, one.teacher.of(one.critic)
    noises = [(x_t - alpha * guided(x_t, t, given.conditioning)) / sigma for guided in both]
    expected = sigma**2 * (noises[0] - noises[1]) / x0.numel()
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_swiftbrushs_critic_hears_the_negative_in_a_tenth_of_its_updates(tmp_path: Path):
    one = method(config(tmp_path, swiftbrush=True))
    heard = Counter()
    one.critic.denoiser.network.register_forward_pre_hook(
        lambda _m, _a, kwargs: heard.update([bool((kwargs["label"] == 0).all())]), with_kwargs=True
    )
    for step in range(200):
        given = batch(step)
        given.conditioning = labels([1.0] * 4, 0.0)
        one.critic_loss(torch.randn(4, 6), given)
    assert 8 <= heard[True] <= 35


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoupled": "half"}, "must be one of none, hybrid, full, constrained, not 'half'"),
        ({"decoupled_normalizer": "conditional"}, "belongs to Decoupled DMD"),
        ({"f_divergence": "tv", "data": "x"}, "must be one of none, rkl"),
        ({"f_divergence": "js"}, "--f_divergence needs real images"),
        ({"f_divergence": "js", "data": "x", "gan_critic_weight": 0.0}, "needs a trained GAN head"),
        ({"f_bins": 10}, "belong to f-distill"),
        ({"f_divergence": "js", "data": "x", "f_momentum": 1.0}, "f_momentum must be in"),
        ({"f_divergence": "js", "data": "x", "f_momentum": 0.5}, "give --f_bins"),
        ({"data": "x"}, "--data is used by the GAN alone"),
        ({"f_divergence": "js", "data": "x", "decoupled": "hybrid"}, "give one of them"),
        ({"swiftbrush": True, "decoupled": "hybrid"}, "give one of them"),
        ({"swiftbrush": True, "normalizer_min": 0.1}, "--swiftbrush knows no --gan_weight"),
    ],
)
def test_settings_that_belong_to_another_method_are_refused(tmp_path: Path, settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        config(tmp_path, **settings)


@pytest.mark.parametrize("settings", [{"decoupled": "hybrid"}, {"decoupled": "constrained"}, {"swiftbrush": True}])
@every_schedule
def test_every_relative_trains_both_roles(tmp_path: Path, schedule: str, settings: dict):
    one = method(config(tmp_path, critic_updates=2, **settings), schedule)
    before = {name: player.state_dict()["network.outer.weight"].clone() for name, player in one.roles.items()}
    make_loop(one, one.config).run()
    after = {name: player.state_dict()["network.outer.weight"] for name, player in one.roles.items()}
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"student", "critic"}
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in rows)
