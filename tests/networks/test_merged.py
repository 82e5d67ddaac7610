"""An adapter's role as a network of its own: its walks, what it follows, what it leaves alone, and who gets one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.networks.adapters import AdapterRole
from fewstep.networks.make_roles import RoleSettings, make_roles
from fewstep.networks.roles import Role
from fewstep.recording import Recording
from fewstep.trainers._dmd2_config import Dmd2Config
from fewstep.training.optimization import RoleOptimizer

CPU = torch.device("cpu")
SETTINGS = RoleSettings(lora_rank=2, lora_alpha=4.0, merged_walks=True, ema=True, seed=1)


def roles_of(recording: Recording, settings: RoleSettings = SETTINGS) -> dict[str, Role]:
    roles = make_roles(settings, recording, ("student", "critic"), CPU)
    torch.manual_seed(2)
    for role in roles.values():
        for parameter in role.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return roles


def ask(role: Role, recording: Recording) -> Tensor:
    torch.manual_seed(3)
    x_t, t = torch.randn(2, *recording.sample_shape), torch.tensor([0.3, 0.8], dtype=torch.float64)
    return role(x_t, t, recording.condition(prompts=["a", "b"]))


def test_a_walk_answers_as_the_adapter_does(recording: Recording) -> None:
    roles = roles_of(recording)
    student, teacher = roles["student"], roles["teacher"]
    assert isinstance(student, AdapterRole)
    with torch.no_grad():
        merged, plain = ask(student, recording), ask(teacher, recording)
    with_gradient = ask(student, recording)
    assert with_gradient.requires_grad and not merged.requires_grad
    torch.testing.assert_close(merged, with_gradient.detach(), rtol=1e-4, atol=1e-5)
    assert (merged - plain).abs().max() > 1e-2  # the adapter says something
    exported = student.stock_network()
    walked = student.denoiser.without_gradient
    assert walked is not None
    for name, value in walked().state_dict().items():
        torch.testing.assert_close(value, exported.state_dict()[name], rtol=1e-6, atol=1e-7)


def test_it_follows_every_way_in_which_an_adapter_changes(recording: Recording) -> None:
    """An update, a loaded checkpoint, weights of another role."""
    roles = roles_of(recording)
    student = roles["student"]
    config = Dmd2Config(teacher="t", out="o", lr=1e-1, lora_rank=2)
    optimizer = RoleOptimizer(student, config, 1e-1)
    start = {name: value.clone() for name, value in student.state_dict().items()}

    def both() -> Tensor:
        with torch.no_grad():
            merged = ask(student, recording)
        torch.testing.assert_close(merged, ask(student, recording).detach(), rtol=1e-4, atol=1e-4)
        return merged

    seen = [both()]
    ask(student, recording).sum().backward()
    optimizer.update(0)
    seen.append(both())
    student.load_state_dict(start)
    seen.append(both())
    student.copy_weights(roles["critic"])
    seen.append(both())
    assert torch.equal(seen[0], seen[2])
    for one, other in [(0, 1), (2, 3), (1, 3)]:
        assert (seen[one] - seen[other]).abs().max() > 1e-4


def test_the_frozen_weights_and_the_other_roles_stay_as_they_are(recording: Recording) -> None:
    before = {name: value.clone() for name, value in recording.network.state_dict().items()}
    roles = roles_of(recording)
    with torch.no_grad():
        teacher = ask(roles["teacher"], recording)
        ask(roles["student"], recording)
        assert torch.equal(ask(roles["teacher"], recording), teacher)
    assert all(torch.equal(value, before[name]) for name, value in recording.network.state_dict().items())
    for name, role in roles.items():
        (expert,) = role.experts.values()
        assert (expert.denoiser.without_gradient is not None) == (name == "student")


def test_only_adapted_weights_are_copied_and_once(recording: Recording) -> None:
    student = roles_of(recording)["student"].single
    assert isinstance(student, AdapterRole) and student.denoiser.without_gradient is not None
    network = student.denoiser.without_gradient()
    assert student.denoiser.without_gradient() is network
    frozen = {parameter.data_ptr() for parameter in student.backbone.network.parameters()}
    own = {name for name, parameter in network.named_parameters() if parameter.data_ptr() not in frozen}
    assert own == {f"{path}.weight" for path in student.backbone.targets}
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(
    ("given", "merges"),
    [
        ({"lora_rank": 2}, True),
        ({}, False),
        ({"lora_rank": 2, "lora_walks": "adapter"}, False),
        ({"lora_rank": 2, "mixed_precision": "bf16"}, False),  # its product would be rounded
        ({"lora_rank": 2, "mixed_precision": "bf16", "lora_walks": "merged"}, True),
        ({"lora_rank": 2, "sharding": "full"}, False),
        ({"lora_rank": 2, "quantization": "quanto_int8"}, False),
    ],
)
def test_who_walks_on_merged_weights(given: dict[str, object], merges: bool) -> None:
    assert Dmd2Config(teacher="t", out="o", **given).merges_walks is merges  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"lora_walks": "merged"}, "--lora_walks belongs to adapters: give --lora_rank"),
        ({"lora_walks": "fast", "lora_rank": 2}, "--lora_walks must be one of"),
        ({"lora_walks": "merged", "lora_rank": 2, "sharding": "full"}, "which --sharding does not leave"),
        ({"lora_walks": "merged", "lora_rank": 2, "quantization": "quanto_int8"}, "which --quantization does not"),
    ],
)
def test_wishes_that_cannot_be_are_refused(given: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Dmd2Config(teacher="t", out="o", **given)  # type: ignore[arg-type]
