"""SiD's own class on small real networks: order, routing through teacher and critic, calls, guidance, and the GANs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from toys import (
    TABLE,
    Labels,
    TinyNetwork,
    every_kind_of_teacher,
    labels,
    make_loop,
    role,
    roles_that_move,
    unconditional,
)

from fewstep.conditioning.conditioning import Conditioning
from fewstep.critic.discriminator import CriticDiscriminator, pooled_logits
from fewstep.data.batch import Batch, Real
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.prediction import add_noise
from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, NoiseSchedule
from fewstep.errors import UserError
from fewstep.losses.score import native_weight
from fewstep.networks.features import FeatureTap
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.programs.planning.call_counts import CallCounter, Calls
from fewstep.trainers.sid import Sid, SidConfig, critic_weight
from fewstep.training.method import Turn
from tests.floors import declared

GRID = (1.0, 0.75, 0.5, 0.25)
ROLES = ("teacher", "student", "critic")
OFF = {"guidance_scale": 1.0}


def config(out: Path, **settings) -> SidConfig:
    defaults = {"max_steps": 4, "batch_size": 4, "log_steps": 1, "report_to": "none", "lr": 1e-3}
    return SidConfig(teacher="tiny", out=str(out), **{**defaults, **settings})


def method_of(settings: SidConfig, roles: dict, sampler: Sampler, discriminator=None, negative=None) -> Sid:
    kappas = settings.kappas(1.0 if settings.guidance_scale is None else settings.guidance_scale)
    scales = (("teacher", kappas.teacher), ("critic", kappas.critic), ("critic", kappas.critic_training))
    guided = [GuidedDenoiser(roles[name], negative, scale) for name, scale in scales]
    return Sid(settings, roles, *guided, sampler, discriminator)


def vector_method(
    settings: SidConfig, schedule: NoiseSchedule | None = None, kind: str = "flow", renoise: str = "fresh"
) -> Sid:
    """SiD over vectors of 6 with labels, the negative being the label 5; three different networks."""
    schedule = schedule or FlowSchedule()
    torch.manual_seed(0)
    roles = {name: role(name, TinyNetwork(6), schedule, kind, trainable=name != "teacher") for name in ROLES}
    return method_of(
        settings, roles, Sampler(schedule, GRID, renoise, schedule.initial_scale()), negative=labels([5.0])
    )


def batch(step: int, indices: range = range(4), logging: bool = False) -> Batch:
    conditions = Labels().batch(0, list(indices))
    return Batch(len(indices), (6,), conditions, Draws(0, step, indices), None, logging)


def step_with_last(last: int) -> int:
    """A step in which the student's step ``last`` of four is drawn."""
    return next(k for k in range(100) if Draws(0, k, range(1)).shared_integer("student_step", 0, 4) == last)


# --- order and number of updates --------------------------------------------------------------------------------------


def test_a_step_is_the_critic_and_then_the_student(tmp_path: Path):
    method = vector_method(config(tmp_path))
    assert [turn.role for turn in method.turns(0, batch(0))] == ["critic", "student"]


def test_the_student_moves_with_every_rth_update_of_the_critic_and_after_the_warm_up(tmp_path: Path):
    method = vector_method(config(tmp_path, critic_updates=3, critic_warmup_steps=4))
    moved = [step for step in range(12) if len(list(method.turns(step, batch(step)))) == 2]
    assert moved == [5, 8, 11]


def test_both_turns_of_all_processes_and_micro_batches_judge_the_same_step(tmp_path: Path):
    method, calls = vector_method(config(tmp_path)), []
    method.roles["student"].denoiser.network.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    counts = Counter()
    for step in range(200):
        seen = set()
        for indices in (range(2), range(2, 4)):
            calls.clear()
            list(method.turns(step, batch(step, indices)))
            half = len(calls) // 2
            # Only the student's last call has a graph.
            assert calls == [False] * (2 * half - 1) + [True]
            seen.add(half)
        counts[seen.pop()] += 1
        assert not seen
    assert counts.keys() == {1, 2, 3, 4}
    assert min(counts.values()) > 30  # uniformly: 50 are expected


# --- the student's loss and where its gradient goes -------------------------------------------------------------------


def student_gradient(method: Sid, turn: Turn) -> list[Tensor]:
    (loss, _), *others = turn.backward
    assert others == []
    return list(torch.autograd.grad(loss, method.roles["student"].parameters(), retain_graph=True))


def by_hand(method: Sid, b: Batch, last: int, alpha: float, through: tuple[str, ...] = ("teacher", "critic")) -> Tensor:
    """The loss written out for a flow; with gradient through the networks named in ``through``."""
    shape = b.shape

    def step_noise(k: int) -> Tensor:
        return b.draws.normal(f"student_walk_step_noise_{k}", shape)

    noise = b.draws.normal("student_walk_noise", shape)
    x0 = rollout(method.roles["student"], method.sampler, noise, b.conditioning, step_noise, last)
    t = torch.sigmoid(torch.tensor(2.0).log() + 1.6 * b.draws.normal("student_time", ()).double())
    x_t = add_noise(x0, b.draws.normal("student_noise", shape), method.schedule.coefficients(t))
    inputs = {name: x_t if name in through else x_t.detach() for name in ("teacher", "critic")}
    p, q = (method.roles[name](x, t, b.conditioning) for name, x in inputs.items())
    weight = (1 - t).float().reshape(-1, 1)
    return (weight * (p - q) * ((p - x0) - alpha * (p - q))).mean()


@pytest.mark.parametrize("last", range(4))
def test_the_student_is_judged_at_the_drawn_step_of_its_own_walk(tmp_path: Path, last: int):
    """The mixture over all steps: each is the ordinary loss of SiD at that step's output."""
    method, step = vector_method(config(tmp_path, alpha=1.2)), step_with_last(last)
    turn = list(method.turns(step, batch(step)))[1]
    expected = by_hand(method, batch(step), last, 1.2)
    torch.testing.assert_close(turn.backward[0][0], expected)
    parameters = method.roles["student"].parameters()
    for ours, theirs in zip(student_gradient(method, turn), torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(ours, theirs)


def test_the_gradient_goes_through_teacher_and_critic(tmp_path: Path):
    method, step = vector_method(config(tmp_path)), step_with_last(0)
    ours = student_gradient(method, list(method.turns(step, batch(step)))[1])
    for through in (("teacher",), ("critic",), ()):
        loss = by_hand(method, batch(step), 0, 1.0, through)
        theirs = torch.autograd.grad(loss, method.roles["student"].parameters())
        assert any(not torch.allclose(a, b, rtol=0.02, atol=0) for a, b in zip(ours, theirs))


def test_each_turn_gives_gradients_to_its_own_role_alone(tmp_path: Path):
    method = vector_method(config(tmp_path, critic_guidance=0.5, guidance_scale=3.0))
    for parameter in method.roles["teacher"].denoiser.network.parameters():
        parameter.requires_grad_()  # even if it could have one
    loop = make_loop(method, method.config)
    generator = method.turns(0, batch(0))
    for name in ("critic", "student"):
        turn = next(generator)
        loop._backward(turn, 1.0)
        held = {n for n in ROLES for p in method.roles[n].denoiser.network.parameters() if p.grad is not None}
        assert held == {name} == {turn.role}
        assert all(not value.requires_grad for value in turn.log.values())
        for parameter in method.roles[name].parameters():
            parameter.grad = None


@pytest.mark.parametrize("renoise", ["fresh", "ode"])
@every_kind_of_teacher
def test_every_kind_of_teacher_trains_both_roles(tmp_path: Path, schedule: NoiseSchedule, kind: str, renoise: str):
    method = vector_method(config(tmp_path, max_steps=3), schedule, kind, renoise)
    assert roles_that_move(method) == {"student", "critic"}


def test_the_critic_of_a_v_network_minimises_the_error_of_the_noise():
    t = torch.tensor([0.1, 0.9], dtype=torch.float64)
    alpha, _ = TABLE.coefficients(t)
    expected = native_weight("v_prediction", TABLE, t) * alpha**2  # snr / (snr + 1) on the error of v
    torch.testing.assert_close(critic_weight("v_prediction", TABLE, t), expected)
    torch.testing.assert_close(critic_weight("epsilon", TABLE, t), expected)
    torch.testing.assert_close(critic_weight("flow", FlowSchedule(), t), t**-2)


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
    assert vector_method(config(tmp_path, **OFF)).dropped is None
    assert vector_method(config(tmp_path, guidance="zero")).dropped is not None
    assert vector_method(config(tmp_path, guidance="zero", critic_dropout=0.0)).dropped is None


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -0.1}, r"--alpha must be in \[0, 1.5\]"),
        ({"alpha": 1.6}, r"--alpha must be in \[0, 1.5\]"),
        ({"alpha": float("nan")}, r"--alpha must be in \[0, 1.5\]"),
        ({"weighting": "square"}, "--weighting must be one of auto, sid, none"),
        ({"guidance": "long"}, "--guidance must be one of long_short, zero, anti"),
        ({"guidance": "zero", "guidance_scale": 4.5}, "leave out --guidance_scale: it is fixed by --guidance zero"),
        ({"guidance": "anti", "critic_guidance": 0.0}, "leave out --critic_guidance: it is fixed by --guidance anti"),
        ({"critic_guidance": float("inf")}, "critic_guidance must be a number"),
        ({"critic_dropout": 1.0}, "critic_dropout"),
        ({"critic_updates": 0}, "critic_updates"),
        ({"critic_warmup_steps": -1}, "critic_warmup_steps"),
        ({"adversarial": "gan"}, "--adversarial must be one of none, diffusion_gan, sida"),
        ({"adversarial": "sida"}, "needs real images"),
        ({"data": "images"}, "leave out --data: it belongs to --adversarial diffusion_gan or sida"),
        ({"gan_weight": 1e-3}, "leave out --gan_weight: it belongs to --adversarial diffusion_gan or sida"),
        ({"gan_start_step": 5}, "leave out --gan_start_step"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        config(tmp_path, **settings)


@pytest.mark.parametrize("schedule", [TABLE, EDMSchedule()], ids=["table", "edm"])
def test_a_flows_weights_are_refused_for_other_teachers(tmp_path: Path, schedule: NoiseSchedule):
    with pytest.raises(UserError, match="1_minus_sigma belongs to flow-matching teachers"):
        vector_method(config(tmp_path, weighting="1_minus_sigma"), schedule, "sample")


def test_the_bound_of_a_weight_is_refused_for_another(tmp_path: Path):
    with pytest.raises(UserError, match="leave out --normalizer_min: it belongs to --weighting sid"):
        vector_method(config(tmp_path, normalizer_min=1e-3))  # a flow teacher's own weight is 1 - sigma
    assert vector_method(config(tmp_path, weighting="sid", normalizer_min=1e-3)).normalizer_min == 1e-3


def test_a_start_below_the_top_is_marginal_where_that_can_ship(tmp_path: Path):
    assert config(tmp_path, steps=1, first_timestep=625).resolved().start == "marginal"
    assert config(tmp_path, steps=4, first_timestep=625, renoise="ode").resolved().start == "marginal"
    assert config(tmp_path, steps=4, first_timestep=625).resolved().start == "noise"
    assert config(tmp_path, steps=1, first_timestep=625, start="noise").resolved().start == "noise"
    assert config(tmp_path, steps=1).resolved().start == "noise"


# --- the adversarial terms, on a stock UNet ---------------------------------------------------------------------------


class StockCall:
    """How a UNet2DModel is called."""

    def call(
        self, network: nn.Module, x: Tensor, timestep: Tensor, conditioning: Conditioning, *, continuous: bool = False
    ) -> Tensor:
        return network(x, timestep).sample


def tiny_unet(seed: int) -> UNet2DModel:
    torch.manual_seed(seed)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 4}
    return UNet2DModel(block_out_channels=(8, 8), **sizes, **blocks)


def picture_batch(step: int, indices: range) -> Batch:
    size, draws = len(indices), Draws(0, step, indices)
    real = torch.stack([torch.full((1, 8, 8), float(index % 3)) for index in indices])
    return Batch(size, (1, 8, 8), unconditional(size), draws, Real(real, unconditional(size)), False)


def gan_method(out: Path, checkpointing: bool = False, **settings) -> Sid:
    settings = {"adversarial": "sida", "data": "pictures", **settings}
    chosen = config(out, **settings)
    roles = {}
    for seed, name in enumerate(ROLES):
        roles[name] = role(name, tiny_unet(seed), TABLE, "epsilon", trainable=name != "teacher")
        roles[name].denoiser.recipe = StockCall()
        if checkpointing:
            roles[name].denoiser.network.enable_gradient_checkpointing()
    discriminator = None
    if chosen.adversarial != "none":
        discriminator = CriticDiscriminator(chosen, roles["critic"], FeatureTap("mid_block"), (1, 8, 8))
    return method_of(chosen, roles, Sampler(TABLE, (0.626,), "ode", 0.9286), discriminator)


def gradients(method: Sid, step: int, b: Batch) -> dict[str, list[Tensor]]:
    """Of each turn's role; networks of different roles share nothing here."""
    found = {}
    for turn in method.turns(step, b):
        parameters = method.roles[turn.role].parameters()
        found[turn.role] = list(torch.autograd.grad(turn.backward[0][0], parameters))
    return found


def test_the_discriminator_adds_no_parameters(tmp_path: Path):
    with_one, without = gan_method(tmp_path), gan_method(tmp_path, adversarial="none", data=None)
    names = [[name for name, _ in m.roles["critic"].named_parameters()] for m in (with_one, without)]
    assert names[0] == names[1]


def test_logits_are_means_over_the_channels_of_maps_and_over_the_tokens():
    maps, tokens = torch.randn(2, 3, 4, 5), torch.randn(2, 7, 3)
    torch.testing.assert_close(pooled_logits(maps), maps.mean(1).flatten(1))
    torch.testing.assert_close(pooled_logits(tokens), tokens.mean(1))
    assert pooled_logits(torch.randn(2, 3, 6, 4, 5)).shape == (2, 120)


@pytest.mark.parametrize("variant", ["diffusion_gan", "sida"])
def test_the_adversarial_terms_pull_at_both_roles(tmp_path: Path, variant: str):
    strong = {"adversarial": variant, "gan_weight": 10.0, "gan_critic_weight": 10.0}
    ours = gradients(gan_method(tmp_path, **strong), 0, picture_batch(0, range(4)))
    plain = gradients(gan_method(tmp_path, adversarial="none", data=None), 0, picture_batch(0, range(4)))
    for name in ("critic", "student"):
        assert any(not torch.allclose(a, b, rtol=0.1) for a, b in zip(ours[name], plain[name]))


def test_the_students_term_begins_when_told(tmp_path: Path):
    method = gan_method(tmp_path, gan_start_step=3)
    logs = [list(method.turns(step, picture_batch(step, range(2))))[1].log for step in (2, 3)]
    assert ["student/adversarial" in log for log in logs] == [False, True]
    assert [declared(method, step, picture_batch(step, range(2)))["critic/features"].to_inputs for step in (2, 3)] == [
        0,
        1,
    ]


def test_real_and_fake_share_time_and_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    method, seen = gan_method(tmp_path), []
    features = method.roles["critic"].denoiser.features
    monkeypatch.setattr(
        method.roles["critic"].denoiser,
        "features",
        lambda x_t, t, *rest: seen.append((x_t, t)) or features(x_t, t, *rest),
    )
    b = picture_batch(0, range(4))
    next(method.turns(0, b))
    (real, t_real), (fake, t_fake) = seen
    assert torch.equal(t_real, t_fake)
    noise = Draws(0, 0, range(4)).normal("critic_noise", (1, 8, 8))
    expected = add_noise(b.real.x0, noise, TABLE.coefficients(t_real))
    torch.testing.assert_close(real, expected)
    assert not torch.equal(fake, real)


@pytest.mark.parametrize(("variant", "adds_up"), [("none", True), ("diffusion_gan", True), ("sida", False)])
def test_micro_batches_add_up_to_their_batch_but_for_sidas_mean(tmp_path: Path, variant: str, adds_up: bool):
    settings = {"adversarial": variant, "gan_weight": 1.0, "gan_critic_weight": 1.0}
    if variant == "none":
        settings = {"adversarial": "none", "data": None}
    method = gan_method(tmp_path, **settings)
    whole = gradients(method, 0, picture_batch(0, range(4)))
    parts = [gradients(method, 0, picture_batch(0, part)) for part in (range(2), range(2, 4))]
    for name in ("critic", "student"):
        halves = [(a + b) / 2 for a, b in zip(*(part[name] for part in parts))]
        same = all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(whole[name], halves))
        assert same == adds_up, name


def test_the_default_weights_are_the_papers_for_means(tmp_path: Path):
    """Their losses are sums over a sample, the student's times 100 (SiD) and times 0.01 or 1 (the adversarial one)."""
    sida, per_sample = (gan_method(tmp_path, adversarial=v).discriminator for v in ("sida", "diffusion_gan"))
    assert (sida.student_weight, sida.critic_weight) == pytest.approx((0.01 / 100, 1 / 64))
    assert (per_sample.student_weight, per_sample.critic_weight) == pytest.approx((1 / 100, 1.0))


@pytest.mark.parametrize("variant", ["diffusion_gan", "sida"])
def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path, variant: str):
    settings = {"adversarial": variant, "gan_weight": 1.0, "gan_critic_weight": 1.0}
    plain, checkpointed = (
        gradients(gan_method(tmp_path, checkpointing, **settings), 0, picture_batch(0, range(2)))
        for checkpointing in (False, True)
    )
    for name in ("critic", "student"):
        for ours, theirs in zip(plain[name], checkpointed[name]):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
