"""Roles and their denoiser on stock networks: copies that share nothing, states that fit or are refused, dtypes."""

import pytest
import tiny_pipelines
import torch
from torch import Tensor
from toys import TinyNetwork, role

from fewstep.config.run import RunConfig
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.prediction import to_x0
from fewstep.diffusion.schedule import FlowSchedule
from fewstep.networks.features import find_tap
from fewstep.networks.heads import make_head
from fewstep.networks.make_roles import RoleSettings
from fewstep.networks.roles import Role, make_role, update_average
from fewstep.recording import Recording, record
from fewstep.recording.watch.shake import shaken


@pytest.fixture(scope="module")
def recording() -> Recording:
    pipeline = tiny_pipelines.tiny_ddim()
    return record(pipeline)


def inputs(recording: Recording, batch: int = 2) -> tuple[Tensor, Tensor, object]:
    x_t = Draws(0, 0, range(batch)).normal("x", recording.sample_shape)
    return x_t, torch.full((batch,), 0.5, dtype=torch.float64), recording.condition().select([0] * batch)


def test_a_role_starts_as_the_teacher_and_shares_no_memory_with_it(recording: Recording):
    teacher = make_role("teacher", recording, trainable=False)
    student = make_role("student", recording, trainable=True)
    arguments = inputs(recording)
    assert torch.equal(teacher(*arguments), student(*arguments))
    pointers = {p.data_ptr() for p in teacher.denoiser.network.parameters()}
    pointers |= {p.data_ptr() for p in recording.network.parameters()}
    assert all(p.data_ptr() not in pointers for p in student.parameters())
    assert teacher.parameters() == []
    assert len(student.parameters()) == len(list(student.denoiser.network.parameters()))
    assert not student.denoiser.network.training


def test_a_denoiser_is_the_network_read_through_its_prediction_type(recording: Recording):
    student = make_role("student", recording, trainable=True)
    x_t, t, conditioning = inputs(recording)
    raw = student.denoiser.network(x_t, torch.tensor([499, 499])).sample
    expected = to_x0(raw, recording.prediction_type, x_t, recording.schedule, t)
    torch.testing.assert_close(student(x_t, t, conditioning), expected, rtol=1e-5, atol=1e-5)


def test_autocast_and_bfloat16_parameters_give_x0_in_the_samples_dtype(recording: Recording):
    arguments = inputs(recording)
    full = make_role("teacher", recording, trainable=False)(*arguments)
    for options in ({"autocast": torch.bfloat16}, {"dtype": torch.bfloat16}):
        x0 = make_role("teacher", recording, trainable=False, **options)(*arguments)
        assert x0.dtype == torch.float32
        assert not torch.equal(x0, full)
        torch.testing.assert_close(x0, full, rtol=0.1, atol=0.1)


def test_an_autocast_call_without_gradient_does_not_spoil_the_gradient_of_the_next(recording: Recording):
    student = make_role("student", recording, trainable=True, autocast=torch.bfloat16)
    arguments = inputs(recording)
    with torch.no_grad():
        student(*arguments)
    student(*arguments).square().mean().backward()
    assert all(p.grad is not None for p in student.parameters())


def test_gradient_checkpointing_changes_neither_output_nor_gradient(recording: Recording):
    arguments = inputs(recording)
    results = []
    for checkpointing in (False, True):
        student = make_role("student", recording, trainable=True, gradient_checkpointing=checkpointing)
        x0 = student(*arguments)
        gradients = torch.autograd.grad(x0.square().mean(), student.parameters())
        results.append([x0.detach(), *gradients])
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["tiny_ddim", "tiny_dit", "tiny_stable_diffusion", "tiny_edm", "tiny_flow"])
def test_features_of_recorded_networks_feed_a_head_of_their_own_shape(name: str):
    recorded = record(getattr(tiny_pipelines, name)())
    conditions = {"prompt": {"prompts": ["a", "b"]}, "label": {"labels": [0, 1]}, None: {}}[recorded.conditional]
    conditioning = recorded.condition(**conditions).select([0, 1] if conditions else [0, 0])
    critic = make_role("critic", recorded, trainable=True)
    x_t, t = Draws(0, 0, range(2)).normal("x", recorded.sample_shape), torch.full((2,), 0.5, dtype=torch.float64)
    with shaken(critic.denoiser.network):
        tap = find_tap(critic.denoiser.network, lambda x: critic.denoiser.raw(x, t, conditioning), x_t)
        features = critic.denoiser.features(x_t.requires_grad_(), t, conditioning, tap)
    logits = make_head(features, seed=0)(features)
    assert logits.shape == (2,)
    assert torch.autograd.grad(logits.sum(), x_t)[0].abs().max() > 0


# --- states ----------------------------------------------------------------------------------------------------------


def with_head() -> Role:
    return role("critic", TinyNetwork(4), FlowSchedule(), "flow", head=torch.nn.Linear(4, 1))


def test_a_state_holds_network_and_added_modules_and_loads_back():
    one, two = with_head(), with_head()
    assert {name.partition(".")[0] for name in one.state_dict()} == {"network", "head"}
    two.load_state_dict({name: value.clone() for name, value in one.state_dict().items()})
    torch.testing.assert_close(two.state_dict(), one.state_dict(), rtol=0, atol=0)
    assert [name for name, _ in one.named_parameters()] == list(one.state_dict())


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_a_state_that_does_not_fit_is_refused_by_role_and_module(change: str):
    one = with_head()
    state = one.state_dict()
    if change == "missing":
        del state["head.bias"]
    else:
        state["head.bias"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"critic\.head do not fit") as caught:
        one.load_state_dict(state)
    assert "\n" not in str(caught.value)


def test_a_role_is_given_a_module_once():
    one = with_head()
    one.add("other", torch.nn.Linear(2, 2))
    assert {name.partition(".")[0] for name in one.state_dict()} == {"network", "head", "other"}
    for name in ("head", "other", "network"):
        with pytest.raises(ValueError, match=f"the critic has a {name} already"):
            one.add(name, torch.nn.Linear(2, 2))
    assert one.added["head"].weight.shape == (1, 4)


def test_copying_weights_takes_the_network_and_leaves_added_modules():
    one, two = with_head(), with_head()
    head = one.added["head"].weight.clone()
    one.copy_weights(two)
    assert torch.equal(one.denoiser.network.inner.weight, two.denoiser.network.inner.weight)
    assert torch.equal(one.added["head"].weight, head)


def test_an_average_moves_by_its_decay_and_copies_what_is_no_float():
    average, student = with_head(), with_head()
    for one, count in ((average, 3), (student, 8)):
        one.denoiser.network.register_buffer("count", torch.tensor(count))
    before = average.denoiser.network.inner.weight.clone()
    update_average(average, student, 0.75)
    expected = 0.75 * before + 0.25 * student.denoiser.network.inner.weight
    torch.testing.assert_close(average.denoiser.network.inner.weight, expected)
    assert average.denoiser.network.count == 8


def test_a_tensor_of_two_names_moves_once():
    average, student = with_head(), with_head()
    for one in (average, student):
        one.denoiser.network.again = one.denoiser.network.inner
    before = average.denoiser.network.inner.weight.clone()
    update_average(average, student, 0.5)
    expected = (before + student.denoiser.network.inner.weight) / 2
    torch.testing.assert_close(average.denoiser.network.inner.weight, expected)


def test_a_network_that_cannot_checkpoint_is_refused(recording: Recording, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(type(recording.network), "_supports_gradient_checkpointing", False)
    with pytest.raises(ValueError, match="has no gradient checkpointing"):
        make_role("student", recording, trainable=True, gradient_checkpointing=True)


def test_the_settings_of_roles_are_those_of_their_run():
    adapters = {"lora_rank": 2, "lora_alpha": 3.0, "full_critic": True}
    same = {"mixed_precision": "bf16", "gradient_checkpointing": True, "seed": 7, **adapters}
    found = RoleSettings.of(RunConfig(teacher="t", out="", ema_decay=0.5, **same))
    assert found == RoleSettings(ema=True, **same)
    assert found.half is torch.bfloat16
    assert RoleSettings.of(RunConfig(teacher="t", out="")) == RoleSettings()
    assert RoleSettings().half is None
