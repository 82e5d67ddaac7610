"""Roles of adapters: their dtypes, states and sizes."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from torch import nn
from toys import adapter_role

from fewstep.config.run import RunConfig
from fewstep.errors import UserError
from fewstep.networks.adapters import Backbone, attention_linears
from fewstep.networks.make_roles import RoleSettings, make_roles
from fewstep.networks.roles import NetworkRole, make_role, update_average
from fewstep.recording import Recording, record
from fewstep.training.optimization import RoleOptimizer
from tests.networks.shared_backbone import ALPHA, RANK, players


def test_a_bfloat16_base_trains_float32_adapters(recording: Recording):
    p = players(recording, separate=False, dtype=torch.bfloat16)
    student = p.roles["student"]
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    frozen = {q.dtype for name, q in student.denoiser.network.named_parameters() if "lora_" not in name}
    assert frozen == {torch.bfloat16} and next(recording.network.parameters()).dtype == torch.float32
    x_t = p.x_t.float()
    for autocast in (None, torch.bfloat16):
        student.denoiser.autocast = autocast
        x0 = student(x_t, p.t, p.conditioning)
        assert x0.dtype == torch.float32
        found = torch.autograd.grad(x0.square().mean(), student.parameters(), allow_unused=True)
        assert {gradient.dtype for gradient in found if gradient is not None} == {torch.float32}


def test_a_state_holds_the_adapter_and_added_modules_alone_and_fits_only_its_like(recording: Recording):
    critic = players(recording, separate=False).roles["critic"]
    critic.add("head", nn.Linear(2, 1))
    state = critic.state_dict()
    parts = {name.partition(".")[0] for name in state}
    assert parts == {"adapter", "head"}
    assert len(state) == 2 * len(critic.backbone.targets) + 2 == len(critic.parameters())
    other = adapter_role("critic", Backbone(recording.network, RANK, ALPHA), recording)
    other.add("head", nn.Linear(2, 1))
    other.load_state_dict(state)
    torch.testing.assert_close(other.state_dict(), {k: v.float() for k, v in state.items()}, rtol=1e-6, atol=1e-7)
    smaller = adapter_role("critic", Backbone(recording.network, RANK - 1, ALPHA), recording)
    with pytest.raises(ValueError, match=r"critic\.adapter do not fit"):
        smaller.load_state_dict(state)


def test_roles_take_over_each_others_adapters_and_full_copies_the_merged_weights(recording: Recording):
    p = players(recording, separate=False, dtype=torch.float32)
    student, critic, teacher = (p.roles[name] for name in ("student", "critic", "teacher"))
    full = make_role("critic", recording, trainable=True)
    full.copy_weights(student)
    arguments = p.x_t, p.t, p.conditioning
    torch.testing.assert_close(full(*arguments), student(*arguments), rtol=1e-4, atol=1e-4)
    critic.copy_weights(student)
    assert torch.equal(critic(*arguments), student(*arguments))
    critic.copy_weights(teacher)
    assert torch.equal(critic(*arguments), teacher(*arguments))
    with pytest.raises(ValueError, match="cannot become"):
        critic.copy_weights(full)


def test_the_average_is_an_adapter_that_moves_by_its_decay(recording: Recording):
    p = players(recording, separate=False)
    student = p.roles["student"]
    average = adapter_role("ema", student.backbone, recording, trainable=False)
    before = {key: value.clone() for key, value in average.state_dict().items()}
    update_average(average, student, 0.75)
    for key, value in average.state_dict().items():
        torch.testing.assert_close(value, 0.75 * before[key] + 0.25 * student.state_dict()[key])
    adapter_role("target", student.backbone, recording)  # PEFT would ask gradients of all adapters again
    assert average.parameters() == [] and len(student.parameters()) == len(before)


def test_a_rank_larger_than_a_layer_is_one_line_that_names_it(recording: Recording):
    text = r"--lora_rank 64 is larger than a layer of \w+: .* take at most \d+$"
    with pytest.raises(UserError, match=text) as caught:
        Backbone(recording.network, 64, 64)
    assert "\n" not in str(caught.value)
    Backbone(recording.network, int(str(caught.value).rpartition(" ")[2]), 1)


def test_a_network_without_attention_is_refused():
    with pytest.raises(UserError, match="Sequential has no attention layer to adapt; leave out --lora_rank"):
        Backbone(nn.Sequential(nn.Linear(2, 2)), 1, 1)


def test_a_network_that_cannot_checkpoint_is_refused(recording: Recording, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(type(recording.network), "_supports_gradient_checkpointing", False)
    with pytest.raises(ValueError, match="has no gradient checkpointing"):
        Backbone(recording.network, 1, 1, gradient_checkpointing=True)


def test_every_linear_layer_below_an_attention_module_is_adapted(recording: Recording):
    names = {name.rpartition(".")[2] for name in attention_linears(recording.network)}
    assert {"to_q", "to_k", "to_v"} <= names


def test_every_role_starts_as_the_teacher_and_two_are_two(recording: Recording):
    settings = RoleSettings(lora_rank=2, ema=True)
    roles = make_roles(settings, recording, ("student", "critic"), torch.device("cpu"))
    p = players(recording, separate=False, dtype=torch.float32)
    outputs = {name: role(p.x_t, p.t, p.conditioning) for name, role in roles.items()}
    assert all(torch.equal(output, outputs["teacher"]) for output in outputs.values())
    assert torch.equal(*(next(iter(roles[name].state_dict().values())) for name in ("student", "ema")))
    assert len({id(role.denoiser.network) for role in roles.values()}) == 1
    settings = replace(settings, full_critic=True)
    roles = make_roles(settings, recording, ("student", "critic"), torch.device("cpu"))
    assert type(roles["critic"]) is NetworkRole
    assert len(roles["critic"].parameters()) == len(list(recording.network.parameters()))
    assert roles["critic"].denoiser.active is nullcontext


def test_a_base_in_bfloat16_has_adapters_gradients_and_optimizer_in_float32(tmp_path: Path) -> None:
    recorded = record(tiny_pipelines.tiny_stable_diffusion())
    config = RunConfig(teacher="t", out=str(tmp_path), lora_rank=2, mixed_precision="bf16", lr=1e-3)
    roles = make_roles(RoleSettings.of(config), recorded, ("student",), torch.device("cpu"))
    student = roles["student"]
    base = [p for name, p in student.backbone.network.named_parameters() if "lora_" not in name]
    assert {p.dtype for p in base} == {torch.bfloat16} and not any(p.requires_grad for p in base)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    optimizer = RoleOptimizer(student, config, 1e-3)
    before = [p.detach().clone() for p in student.parameters()]
    x, t = torch.randn(2, *recorded.sample_shape), torch.tensor([0.4, 0.9], dtype=torch.float64)
    x0 = student(x, t, recorded.condition(["a", "b"]))
    assert x0.dtype == torch.float32
    x0.square().mean().backward(inputs=optimizer.held.leaves)
    assert {p.grad.dtype for p in optimizer.held.own} == {torch.float32}
    optimizer.update(0)
    assert any(not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    floating = [v for v in optimizer.state().values() if v.is_floating_point()]
    assert floating and {v.dtype for v in floating} == {torch.float32}
