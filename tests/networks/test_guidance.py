"""Classifier-free guidance of a denoiser: one call where conditions can be joined, two where not, nothing where off."""

from pathlib import Path

import pytest
import torch
from tiny_pipelines import tiny_dit, tiny_stable_diffusion
from torch import Tensor, nn
from toys import TABLE, PlainRecipe, TinyNetwork, labels, role

from fewstep.conditioning.conditioning import Conditioning, Leaf
from fewstep.conditioning.outside import Pins, as_beside, with_outside
from fewstep.conditioning.ragged import join, with_others
from fewstep.config.run import RunConfig
from fewstep.diffusion.prediction import expand, to_x0
from fewstep.diffusion.rescaling import KINDS, Rescaling
from fewstep.diffusion.schedule import FlowSchedule, NoiseSchedule
from fewstep.errors import UserError
from fewstep.kernels import dispatch
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.networks.experts import ExpertsRole
from fewstep.networks.guidance import GuidedDenoiser, guide
from fewstep.networks.roles import NetworkRole
from fewstep.programs.pairs import make_pairs
from fewstep.programs.workbench import Workbench, open_workbench
from fewstep.recording.watch.shake import shaken


class Model:
    """x0 = x_t + t + the sum of a sample's text; it notes the batch of every call."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, end: Tensor | None = None) -> Tensor:
        self.batches.append(len(x_t))
        assert conditioning.batch_size == len(x_t) == len(t)
        text = conditioning.arguments()["text"].sum(1, keepdim=True)
        return x_t + t.reshape(-1, 1).float() + text


def texts(*lengths: int, value: float = 1.0, away: Conditioning | None = None) -> Conditioning:
    """Of one length; ``away``: what guidance leads away from."""
    rows = [torch.full((length,), value) for length in lengths]
    others = [] if away is None else [away.select([0] * len(rows))]
    return Conditioning({"text": Leaf(torch.stack(rows), rows=1)}, len(rows), others)


X = torch.arange(6.0).reshape(3, 2)
T = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)


@pytest.mark.parametrize(("negative", "batches"), [(texts(4, value=-1.0), [6]), (texts(2, value=-1.0), [3, 3])])
def test_guidance_is_the_same_in_one_call_and_in_two(negative: Conditioning, batches: list[int]):
    model = Model()
    guided = GuidedDenoiser(model, 3.0)(X, T, texts(4, 4, 4, away=negative))
    assert model.batches == batches
    positive = X + T.reshape(-1, 1).float() + 4.0
    expected = guide(positive, positive - 4.0 - negative.arguments()["text"].numel(), 3.0)
    torch.testing.assert_close(guided, expected)


@pytest.mark.parametrize("ragged", [False, True])
def test_guidance_that_is_asked_in_sequence_says_the_same(ragged: bool):
    """Also for another denoiser under it, with a scale for each sample, and where the batch is ragged itself."""
    model, negative = Model(), texts(4, value=-1.0)
    conditioning = join([texts(4, 4), texts(2)]) if ragged else texts(4, 4, 4)
    conditioning = with_others(conditioning, [negative.select([0, 0, 0])])
    joint = GuidedDenoiser(model, 3.0)(X, T, conditioning)
    model.batches.clear()
    sequential = GuidedDenoiser(Model(), 3.0, joint=False).of(model)
    assert torch.equal(sequential(X, T, conditioning), joint)
    assert model.batches == ([3, 2, 1] if ragged else [3, 3])
    scales = torch.tensor([3.0, 3.0, 3.0])
    assert torch.equal(sequential(X, T, conditioning, guidance_scale=scales), joint)


def test_each_sample_is_led_away_from_its_own_further_answer():
    """Whatever else is in its batch, in one call and in two, of several shapes, selected and joined."""
    own = [-1.0, 2.0, 5.0]
    items = [texts(4, value=k, away=texts(4 if k else 2, value=away)) for k, away in enumerate(own)]
    batches = [
        (range(3), join(items)),
        ((2, 0, 1), join(items).select([2, 0, 1])),
        ((1, 2), join(items).select([1, 2])),
    ]
    for joint in (True, False):
        for rows, told in batches:
            at = X[list(rows)], T[list(rows)]
            found = GuidedDenoiser(Model(), 3.0, joint=joint)(*at, told)
            for place, row in enumerate(rows):
                alone = GuidedDenoiser(Model(), 3.0)(X[row : row + 1], T[row : row + 1], items[row])
                torch.testing.assert_close(found[place : place + 1], alone)
    told = join(items[1:])
    swapped = with_others(told, [told.others[0].select([1, 0])])
    right, wrong = (GuidedDenoiser(Model(), 3.0)(X[1:], T[1:], each) for each in (told, swapped))
    assert (right - wrong).abs().min() > 1


def test_a_scale_of_one_costs_one_call_and_changes_nothing():
    model = Model()
    plain = Model()(X, T, texts(4, 4, 4))
    for negative in (None, texts(4, value=-1.0)):
        further = 0 if negative is None else 1
        assert torch.equal(GuidedDenoiser(model, 1.0, further)(X, T, texts(4, 4, 4, away=negative)), plain)
    assert model.batches == [3, 3]


def test_scales_follow_diffusers_convention():
    positive, negative = torch.tensor([2.0]), torch.tensor([1.0])
    assert guide(positive, negative, 0.0).item() == 1.0
    assert guide(positive, negative, 1.0).item() == 2.0
    assert guide(positive, negative, 7.5).item() == 8.5


def test_each_sample_may_have_a_scale_of_its_own():
    scales, told = torch.tensor([1.0, 3.0, 7.0]), texts(4, 4, 4, away=texts(4, value=-1.0))
    for usual in (1.0, 5.0):
        each = GuidedDenoiser(Model(), usual)(X, T, told, guidance_scale=scales)
        for k, scale in enumerate(scales.tolist()):
            alone = GuidedDenoiser(Model(), scale)(X, T, told)
            torch.testing.assert_close(each[k], alone[k])


def test_a_teacher_without_a_negative_cannot_be_guided():
    with pytest.raises(ValueError, match="set guidance_scale to 1"):
        GuidedDenoiser(Model(), 4.0, further=0)
    with pytest.raises(ValueError, match="no further answer to be led away from"):
        GuidedDenoiser(Model(), 4.0)(X, T, texts(4, 4, 4))


def test_a_scale_of_zero_costs_one_call_of_the_negative_alone():
    model, negative = Model(), texts(4, value=-1.0)
    guided = GuidedDenoiser(model, 0.0)
    assert torch.equal(guided(X, T, texts(4, 4, 4, away=negative)), Model()(X, T, negative.select([0, 0, 0])))
    assert model.batches == [3]
    assert [GuidedDenoiser(model, scale).calls for scale in (0.0, 1.0, -1.0, 4.5)] == [1, 1, 2, 2]


def test_a_negative_scale_leads_away_from_the_condition():
    positive = Model()(X, T, texts(4, 4, 4))
    negative = Model()(X, T, texts(4, 4, 4, value=-1.0))
    guided = GuidedDenoiser(Model(), -1.0)(X, T, texts(4, 4, 4, away=texts(4, value=-1.0)))
    torch.testing.assert_close(guided, 2 * negative - positive)


def bench(pipeline, out: Path, **settings) -> Workbench:
    (out / "prompts.txt").write_text("a cat\na dog\n")
    prompts = {"prompts": str(out / "prompts.txt")} if hasattr(pipeline, "text_encoder") else {"classes": "0-3"}
    config = RunConfig(teacher="t", out=str(out / "run"), steps=1, cpu=True, report_to="none", **prompts, **settings)
    return open_workbench(config, "cpu", pipeline)


def test_a_teacher_that_does_not_hear_its_condition_is_not_guided(tmp_path: Path):
    """It reacts to the sample and to the time, so that only its answers to prompt and negative tell."""
    pipeline = tiny_stable_diffusion()
    with shaken(pipeline.unet):
        assert bench(pipeline, tmp_path, guidance_scale=3.0).guidance_scale == 3.0
        for name, module in pipeline.unet.named_modules():
            if name.endswith("attn2.to_v"):
                module.weight.data = torch.zeros_like(module.weight)
        for settings in ({}, {"guidance_scale": 3.0}):
            with pytest.raises(UserError, match="guidance would change nothing; use --guidance_scale 1"):
                bench(pipeline, tmp_path, **settings)
        with pytest.raises(UserError, match="guidance would change nothing; use --guidance_scale 1"):
            make_pairs(pipeline, out=str(tmp_path / "pairs"), num=2, prompts=str(tmp_path / "prompts.txt"), cpu=True)
        assert bench(pipeline, tmp_path, guidance_scale=1.0).guidance_scale == 1.0


def test_an_untrained_teacher_is_not_taken_for_a_deaf_one(tmp_path: Path):
    pipeline = tiny_dit()
    nn.init.zeros_(pipeline.transformer.proj_out_2.weight)
    nn.init.zeros_(pipeline.transformer.proj_out_2.bias)
    with pytest.warns(UserWarning, match="are its weights untrained"):
        assert bench(pipeline, tmp_path).guidance_scale == 4.0


def test_a_network_is_guided_in_its_raw_output_and_converted_once():
    """A network, a role of it and several experts, with a number and with a scale of each sample."""
    schedule, conditioning = FlowSchedule(), labels([-1.0, 0.0, 1.0])
    roles = [role("teacher", TinyNetwork(6).double(), schedule, "flow") for _ in range(2)]
    experts = ExpertsRole("teacher", {"high": (0.5, roles[0]), "low": (0.0, roles[1])})
    x_t = torch.randn(3, 6, dtype=torch.float64)
    for denoiser in (roles[0].denoiser, roles[0], experts, experts.denoiser):
        for scale in (3.0, torch.tensor([0.5, 1.0, 4.0])):
            guided = GuidedDenoiser(denoiser, 3.0)
            with dispatch.counted() as counted:
                found = guided(x_t, T, conditioning, guidance_scale=scale if isinstance(scale, Tensor) else None)
            assert counted == {("guided_x0", "reference"): 1}
            wide = scale.double()[:, None] if isinstance(scale, Tensor) else scale
            torch.testing.assert_close(found, guide(*guided.pair(x_t, T, conditioning), wide), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("schedule", "prediction"), [(FlowSchedule(), "flow"), (TABLE, "epsilon")])
@pytest.mark.parametrize(("kind", "axis"), [*((kind, -1) for kind in KINDS), ("tokens", -2)])
def test_a_rescaled_sum_is_sized_by_what_the_network_says_and_known_entries_stay_known(
    kind: str, axis: int, schedule: NoiseSchedule, prediction: str
):
    """The pipeline sizes all that its network says, then pins what it pins; no answer says more of what is unread."""
    x_t = torch.randn(3, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    where, value = x_t > 0.5, torch.randn(3, 2, 3, dtype=torch.float64)
    unread = torch.tensor([[False, True, False], [False, False, False]])
    positive, negative = labels([-1.0, 0.0, 1.0], None), labels([5.0] * 3, None)
    told = with_outside(positive, Pins(where, value), None)
    conditioning = with_others(told, [as_beside(told, negative)])
    recipe = PlainRecipe()
    recipe.unread = unread
    denoisers = [NetworkDenoiser(TinyNetwork(6).double().eval(), recipe, schedule, prediction) for _ in range(2)]
    roles = [NetworkRole("teacher", one) for one in denoisers]
    experts = ExpertsRole("teacher", {"high": (0.95, roles[0]), "low": (0.0, roles[1])})
    timestep = schedule.timestep(T)
    said = [denoisers[1].network(x_t, timestep, **each.arguments()) for each in (positive, negative)]
    rescaling = Rescaling(kind, 0.7, axis)
    total = rescaling(guide(*said, 4.0), said[0])
    x0, alone = (to_x0(answer, prediction, x_t, schedule, T) for answer in (total, said[0]))
    x0, alone = (torch.where(where, value, answer.masked_fill(unread, 0)) for answer in (x0, alone))
    assert where.any() and not where.flatten(1).all(1).any() and (total - guide(*said, 4.0)).abs().min() > 1e-3
    for denoiser in (denoisers[1], roles[1], experts, experts.denoiser):
        guided = GuidedDenoiser(denoiser, 4.0, rescaling=rescaling)
        torch.testing.assert_close(guided(x_t, T, conditioning), x0, rtol=1e-12, atol=1e-12)
        first, second = guided.pair(x_t, T, conditioning)
        torch.testing.assert_close(first, alone, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(guide(first, second, 4.0), x0, rtol=1e-12, atol=1e-12)
    velocity = GuidedDenoiser(denoisers[1].velocity, 4.0, rescaling=rescaling)
    alpha, sigma = (expand(one, x_t) for one in schedule.coefficients(T))
    expected = (x_t - (alpha + sigma) * x0) / sigma
    torch.testing.assert_close(velocity(x_t, T, conditioning), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(guide(*velocity.pair(x_t, T, conditioning), 4.0), expected, rtol=1e-12, atol=1e-12)
