"""SpeedUpNet on an attention to one token: the adapter's formula, closed forms, gradients, costs, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from toys import TABLE, every_kind_of_teacher, make_loop

from fewstep.conditioning.conditioning import Conditioning
from fewstep.conditioning.ragged import with_others
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.rollout import draw_sample
from fewstep.diffusion.windows import Window
from fewstep.errors import UserError
from fewstep.eval.bench.floors import declared
from fewstep.networks.speed_up import refuse_several_negatives
from fewstep.programs.planning.call_counts import CallCounter
from fewstep.trainers.speed_up_net import SpeedUpNet, SpeedUpNetConfig
from tests.mixture import energy_distance
from tests.trainers.toy_speed_up_net import (
    FLOW,
    D,
    Gaussian,
    OneToken,
    Prompts,
    Samples,
    adapter_of,
    batch,
    method,
    tokens,
)

QUIET = {"batch_size": 6, "max_steps": 4, "log_steps": 100, "report_to": "none", "lr": 1e-2, "data": "images"}


def config(out: Path | str = "out", **settings) -> SpeedUpNetConfig:
    return SpeedUpNetConfig(teacher="tiny", out=str(out), steps=2, **{**QUIET, "solver_steps": 2, **settings})


def velocities(one, kappa: float, x, t, positive, negative):
    """The student's, and the guided teacher's (B, D)."""
    said = [one.teacher.denoiser(x, t, told) for told in (negative, positive)]
    guided = said[0] + kappa * (said[1] - said[0])
    ours = one.student.denoiser.against(x, t, positive, negative)
    return [one.velocity(x, x0, t) for x0 in (ours, guided)]


# --- the adapter ------------------------------------------------------------------------------------------------------


def test_the_offset_is_the_papers_with_norms_of_single_samples():
    torch.manual_seed(0)
    network = OneToken().eval()
    adapter = adapter_of(network)
    for parameter in adapter.parameters():
        parameter.data = torch.randn_like(parameter)
    x, t = torch.randn(3, D), torch.full((3,), 500.0)
    positive, negative = torch.randn(3, 5, D), torch.randn(3, 5, D)
    with adapter.on(network, {"encoder_hidden_states": negative}):
        given = network(x, t, positive)
    attention = network.attention.double()
    q = attention.to_q(x[:, None].double())
    own = scaled_dot_product_attention(q, attention.to_k(positive.double()), attention.to_v(positive.double()))
    mixed = own.clone()
    for sign, offset, told in ((-1, adapter.negative[0], negative), (1, adapter.positive[0], positive)):
        k, v = (told.double() @ part.up.weight.double().T for part in (offset.to_k, offset.to_v))
        answer = scaled_dot_product_attention(q, k, v)
        ratio = own.flatten(1).norm(dim=1) / answer.flatten(1).norm(dim=1)
        mixed += sign * (offset.scale * answer * ratio[:, None, None] + offset.shift)
    expected = x * torch.cos(t[:, None] / 700) + attention.to_out[0](mixed)[:, 0]
    torch.testing.assert_close(given.double(), expected, rtol=1e-5, atol=1e-5)
    with adapter.on(network.float(), {"encoder_hidden_states": negative[:1]}):  # whatever else is in the batch
        torch.testing.assert_close(network(x[:1], t[:1], positive[:1]), given[:1])


@pytest.mark.parametrize("rank", [0, 2])
def test_it_is_the_identity_without_scale_and_where_the_prompts_are_alike(rank: int):
    torch.manual_seed(0)
    network = OneToken().eval()
    x, t, told = torch.randn(2, D), torch.full((2,), 300.0), torch.randn(2, 3, D)
    plain = network(x, t, told)
    silent = adapter_of(network, rank, scale=0.0)
    with silent.on(network):
        assert torch.equal(network(x, t, told), plain)
    adapter = adapter_of(network, rank)
    with adapter.on(network, {"encoder_hidden_states": told}):
        torch.testing.assert_close(network(x, t, told), plain)
    with adapter.on(network):
        assert not torch.allclose(network(x, t, told), plain)
    assert torch.equal(network(x, t, told), plain)  # the hooks are gone


def test_the_first_of_its_steps_begins_at_the_samplers_noise_which_holds_nothing_of_the_sample():
    trained, t = method(config(), TABLE, "epsilon"), torch.tensor([1.0, 0.5], dtype=torch.float64)
    x0, noise = torch.ones(2, D), batch(0, range(2)).draws.normal("noise", (D,))
    begun, later = trained.start(x0, noise, t)
    assert torch.equal(begun, noise[0])
    alpha, sigma = (number[1].float() for number in TABLE.coefficients(t))
    torch.testing.assert_close(later, alpha * x0[1] + sigma * noise[1])


def test_the_first_step_begins_at_the_noise_also_below_the_tables_top():
    trained, t = method(config(), TABLE, "epsilon", grid=(0.6, 0.3)), torch.tensor([0.6, 0.3], dtype=torch.float64)
    x0, noise = torch.ones(2, D), batch(0, range(2)).draws.normal("noise", (D,))
    begun, later = trained.start(x0, noise, t)
    assert torch.equal(begun, noise[0]) and not torch.equal(later, noise[1])


def test_the_teachers_steps_are_even_before_its_shift():
    """3 t / (1 + 2 t)."""
    plain, asked = method(config(solver_steps=2), grid=(1.0, 0.75)), []
    one = SpeedUpNet(plain.config, plain.roles, plain.teacher, plain.sampler, shift=3.0)
    one.teacher = lambda x, t, *_, **__: asked.append(t) or x
    window = Window(*torch.tensor([[1.0, 0.75], [0.75, 0.0]], dtype=torch.float64))
    x = torch.zeros(2, D)
    one.walk(x, window, tokens([0, 1]), tokens([3, 3]), x)
    torch.testing.assert_close(torch.stack(asked), torch.tensor([[1.0, 0.75], [0.9, 0.5]], dtype=torch.float64))


def test_of_several_answers_of_a_sample_that_is_told_a_picture_the_first_is_its_negative():
    own = with_others(tokens([0, 1]), [tokens([2, 2]), tokens([3, 3])])
    assert method(config(), pictured=True).negatives(batch(0, range(2)), own) is own.others[0]


def test_tokens_that_a_mask_leaves_out_are_not_seen():
    torch.manual_seed(0)
    network = OneToken().eval()
    adapter, told = adapter_of(network), torch.randn(1, 3, D)
    short, mask = adapter.text(network, {"encoder_hidden_states": told[:, :2]}, told), torch.tensor([[1, 1, 0]])
    long = adapter.text(network, {"encoder_hidden_states": told, "encoder_attention_mask": mask}, told)
    query, own = torch.randn(1, 2, D), torch.randn(1, 2, D)
    answers = [adapter.negative[0](query, text, own, network.attention) for text in (short, long)]
    torch.testing.assert_close(*answers)


# --- closed forms -----------------------------------------------------------------------------------------------------


@every_kind_of_teacher
@pytest.mark.parametrize("kappa", [1.0, 3.0, 7.5])
def test_guidance_of_one_token_is_said_exactly_by_the_scales(schedule, kind: str, kappa: float):
    """A0(c+) - (k - 1) A(c-) + (k - 1) A(c+) is what guidance makes of a network that is linear in its attention."""
    one = method(config(), schedule, kind)
    for offset in (*one.student.added["speed_up"].negative, *one.student.added["speed_up"].positive):
        offset.scale.data.fill_(kappa - 1)
    t = schedule.snap(torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64))
    ours, guided = velocities(one, kappa, torch.randn(3, D), t, tokens([0, 1, 2]), tokens([3, 2, 1]))
    torch.testing.assert_close(ours, guided, rtol=1e-3, atol=1e-4)


@every_kind_of_teacher
def test_with_one_step_of_the_teacher_both_distances_are_one(schedule, kind: str):
    one = method(config(solver_steps=1), schedule, kind)
    (turn,) = one.turns(0, batch())
    torch.testing.assert_close(turn.log["student/offset"], turn.log["student/consistency"], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(turn.backward[0][0], 2 * turn.log["student/offset"], rtol=1e-3, atol=1e-5)


def test_both_distances_are_weighed_and_both_sides_are_led_from_the_same_prompts(monkeypatch: pytest.MonkeyPatch):
    one = method(config(offset_weight=0.3, consistency_weight=0.7, negative_share=1.0))
    against, seen = one.student.denoiser.against, []
    told = [one.negatives(batch(), batch().conditioning), batch().conditioning.others[0]]
    monkeypatch.setattr(one.student.denoiser, "against", lambda *given: (seen.append(given[3]), against(*given))[1])
    (turn,) = one.turns(0, batch())
    offset, consistency = (turn.log[f"student/{name}"] for name in ("offset", "consistency"))
    assert float(offset) != pytest.approx(float(consistency), rel=1e-2)
    torch.testing.assert_close(turn.backward[0][0].detach(), 0.3 * offset + 0.7 * consistency)
    asked, ours, usual = (of.arguments()["encoder_hidden_states"] for of in (*seen, *told))
    assert torch.equal(asked, ours) and not torch.equal(asked, usual)


def test_many_steps_of_the_teacher_lead_where_the_closed_form_does():
    """x_s = m_s + (s_s / s_t) (x_t - m_t), with the mean of the guided Gaussian."""
    window = Window(torch.full((6,), 1.0, dtype=torch.float64), torch.full((6,), 0.5, dtype=torch.float64))
    given, errors = batch(), []
    for steps in (4, 8, 16):
        one = method(config(solver_steps=steps), network=Gaussian())
        x_t = torch.randn(6, D, generator=torch.Generator().manual_seed(1))
        guided = one.teacher.denoiser.denoiser.network.guided_mean(given.real.conditioning, 3.0)
        size = [((1 - t) ** 2 * Gaussian.S**2 + t**2) ** 0.5 for t in (1.0, 0.5)]
        exact = 0.5 * guided + size[1] / size[0] * x_t
        _, x_s = one.walk(x_t, window, given.real.conditioning, tokens([3] * 6), x_t)
        errors.append((x_s - exact).abs().max().item())
        line = one.mean_velocity(x_t, x_s, window)
        torch.testing.assert_close(x_t - 0.5 * line, x_s, rtol=1e-4, atol=1e-5)  # one step of the sampler's
    assert errors[0] > 1.7 * errors[1] > 2.9 * errors[2] and errors[2] < 0.05, errors


def test_a_student_of_two_steps_draws_from_the_guided_gaussians():
    """Energy distance of samples, per prompt, to the guided teacher's closed form, before and after training."""
    one = method(config(solver_steps=8, offset_weight=0.0, negative_share=0.0), network=Gaussian())
    network = one.teacher.denoiser.denoiser.network
    optimizer = torch.optim.Adam(one.student.parameters(), lr=2e-2)

    def real(told: Conditioning, seed: int) -> Tensor:
        noise = torch.randn(told.batch_size, D, generator=torch.Generator().manual_seed(seed))
        return network.guided_mean(told, 3.0) + Gaussian.S * noise

    def apart() -> list[float]:
        found = []
        for prompt in range(3):
            told, draws = tokens([prompt] * 400), Draws(1, prompt, range(400))
            with torch.no_grad():
                made = draw_sample(one.student, one.sampler, draws, (D,), told, 1)
            found.append(energy_distance(made, real(told, prompt)))
        return found

    before = apart()
    for step in range(80):
        given = batch(step, range(step * 24, step * 24 + 24))
        given.real.x0.copy_(real(given.real.conditioning, step))
        (turn,) = one.turns(step, given)
        optimizer.zero_grad()
        turn.backward[0][0].backward()
        optimizer.step()
    after = apart()
    assert max(after) < 0.05 * min(before), (before, after)


# --- what gets a gradient, and what is asked --------------------------------------------------------------------------


@every_kind_of_teacher
@pytest.mark.parametrize("rank", [0, 2])
def test_the_adapter_alone_learns_at_the_declared_cost(tmp_path: Path, schedule, kind: str, rank: int):
    one = method(config(tmp_path, lora_rank=rank), schedule, kind)
    before = {name: value.clone() for name, value in one.student.state_dict().items()}
    network = {name: value.clone() for name, value in one.teacher.denoiser.denoiser.network.state_dict().items()}
    assert all(name.startswith("speed_up.") for name in before)
    with CallCounter(one) as counter:
        make_loop(one, one.config, (D,), conditions=Prompts(), real=Samples()).run()
    after = one.student.state_dict()
    kept = {"speed_up.usual_tokens"} | ({n for n in before if ".down" in n} if rank else set())
    # A single token's weight is 1, so that keys have no say in this toy.
    assert {n for n in before if not torch.equal(before[n], after[n])} >= {n for n in before if "to_k" not in n} - kept
    assert torch.equal(before["speed_up.usual_tokens"], after["speed_up.usual_tokens"])
    assert all(torch.equal(v, network[n]) for n, v in one.teacher.denoiser.denoiser.network.state_dict().items())
    for step in counter.steps:
        assert counter.calls(step) == declared(one, step, batch(step))


def test_micro_batches_and_resumes_change_nothing(tmp_path: Path):
    whole = method(config(tmp_path / "whole"))
    start = {name: value.clone() for name, value in whole.student.state_dict().items()}
    make_loop(whole, whole.config, (D,), conditions=Prompts(), real=Samples()).run()
    for settings in ({"max_steps": 2}, {"resume": True}):
        parts = config(tmp_path / "parts", batch_size=3, gradient_accumulation_steps=2, **settings)
        resumed = method(parts)
        loop = make_loop(resumed, resumed.config, (D,), conditions=Prompts(), real=Samples())
        if settings.get("resume"):
            loop.resume()
        loop.run()
    ends = [one.student.state_dict() for one in (whole, resumed)]
    before, one, other = (torch.cat([value.flatten() for value in state.values()]) for state in (start, *ends))
    # As a whole: where a gradient is next to nothing, Adam makes a step of what rounding leaves of it.
    assert (other - one).norm() <= 3e-3 * (one - before).norm()


def test_negatives_are_the_usual_one_or_prompts_of_the_run_by_their_share():
    usual = torch.eye(D)[3]
    shares = {}
    for share in (0.0, 0.5, 1.0):
        one, given = method(config(negative_share=share)), batch(0, range(400))
        told = one.negatives(given, given.real.conditioning).arguments()["encoder_hidden_states"][:, 0]
        shares[share] = (told == usual).all(1).float().mean().item()
        others = given.conditioning.arguments()["encoder_hidden_states"][:, 0]
        assert ((told == usual).all(1) | (told == others).all(1)).all()
    assert shares[0.0] == 1 and shares[1.0] == 0 and 0.4 < shares[0.5] < 0.6


def test_samples_that_are_told_pictures_keep_their_own_negatives():
    """Another's would lead the teacher away from another picture, and pin that in the sample."""
    one, given = method(config(negative_share=1.0), pictured=True), batch()
    own = with_others(given.real.conditioning.alone(), [tokens([n % 2 for n in range(6)]).alone()] * 2)
    assert one.negatives(given, own) is own.others[0]
    told = []
    one.teacher = lambda x, t, conditioning, guidance_scale: told.append(conditioning) or x
    one.walk(given.real.x0, one.window(given), own, own.others[0], given.real.x0)
    assert told and all(len(each.others) == 2 and each.others[0] is own.others[0] for each in told)


def test_items_whose_negative_prompts_differ_are_refused():
    one, same = tokens([0, 0]), tokens([1, 1])
    other = with_others(same, [tokens([2, 2]).alone()])
    refuse_several_negatives(one, same)
    with pytest.raises(UserError, match="keeps one negative prompt, and here each item has another"):
        refuse_several_negatives(one, other)


def test_a_drawn_guidance_is_the_teachers_of_each_sample():
    one, given = method(config(guidance_min=5.0, guidance_max=10.0)), batch(0, range(50))
    scale = one.guidance_scale(given)
    assert 5 <= scale.min() < 6 and 9 < scale.max() <= 10
    window = one.window(batch(0, range(50)))
    x_t, negative = torch.randn(50, D), tokens([3] * 50)
    said, _ = one.walk(x_t, window, given.real.conditioning, negative, x_t, scale)
    ends = [one.teacher.denoiser(x_t, window.start, c) for c in (negative, given.real.conditioning)]
    torch.testing.assert_close(said, ends[0] + scale.float()[:, None] * (ends[1] - ends[0]), rtol=1e-4, atol=1e-4)


def test_the_first_step_begins_at_the_samplers_own_noise():
    one = method(config())
    t = torch.tensor([1.0, 0.5], dtype=torch.float64)
    noise, x0 = torch.randn(2, D), torch.full((2, D), 5.0)
    torch.testing.assert_close(one.start(x0, noise, t)[0], noise[0])
    torch.testing.assert_close(one.start(x0, noise, t)[1], (noise[1] + 5) / 2)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver_steps": 0}, "--solver_steps"),
        ({"solver": "dpm"}, "--solver must be one of"),
        ({"offset_weight": -1.0}, "--offset_weight"),
        ({"offset_weight": 0.0, "consistency_weight": 0.0}, "nothing to train"),
        ({"negative_share": 1.5}, "--negative_share must be in"),
        ({"distance": "pseudo_huber_norm"}, "--distance must be one of"),
        ({"renoise": "fresh"}, "--renoise must be ode"),
        ({"lora_rank": 2, "merge": True}, "--merge and --full_critic are of adapters"),
        ({"sharding": "full"}, "--sharding is not for SpeedUpNet"),
        ({"guidance_min": 5.0}, "must be a range"),
        ({"guidance_min": 5.0, "guidance_max": 10.0, "guidance_scale": 3.0}, "is drawn from --guidance_min"),
        ({"pairs": "folder"}, "give --data or --pairs, not both"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        config(**settings)


def test_teachers_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="--guidance_scale 1 is none"):
        config().refuse_teacher(FLOW, 1.0, 1.0)
    config(guidance_min=2.0, guidance_max=4.0).refuse_teacher(FLOW, 1.0, 1.0)
    with pytest.raises(UserError, match="are more than the"):
        config(solver_steps=600).refuse_teacher(TABLE, 1.0, 3.0)
