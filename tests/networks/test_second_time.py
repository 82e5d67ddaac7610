"""Second times of stock networks: where they enter, under checkpointing, and in an average."""

from __future__ import annotations

import pipeline_folder
import pytest
import torch
from tiny_pipelines import TINY, WAN_CALL, tiny_dit, tiny_wan
from torch import Tensor, nn

from fewstep.conditioning.conditioning import Conditioning
from fewstep.errors import UserError
from fewstep.networks.adapters import Backbone
from fewstep.networks.roles import follow, make_role, update_average
from fewstep.networks.second_time import attach_second_time
from fewstep.networks.time_embedders import find_time_embedders, likely_time_embedders
from fewstep.recording import record
from fewstep.recording.watch.shake import shaken
from tests.networks.second_times import Told, sites_of, stir, told

# --- where it enters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("dit", {f"transformer_blocks.{k}.norm1.emb.timestep_embedder": 16 for k in range(2)}),
        ("stable_diffusion", {"time_embedding": 32}),
        ("ddim", {"time_embedding": 32}),
        ("flow", {"time_text_embed.timestep_embedder": 16}),
    ],
)
def test_it_enters_where_the_time_alone_is_known(family: str, expected: dict[str, int]):
    builder, call = TINY[family]
    pipeline = builder()
    found = sites_of(pipeline, **call)
    assert found == expected
    likely = likely_time_embedders(pipeline_folder.denoiser(pipeline))
    assert found.items() <= likely.items()  # DiT's last norm is given the embedder of its first block


def test_wan_has_one_place():
    pipeline = tiny_wan()
    pipeline.register_modules(transformer_2=None)
    pipeline.register_to_config(boundary_ratio=None)
    assert sites_of(pipeline, prompt="the cat", **WAN_CALL) == {"condition_embedder.time_embedder": 24}


class Timeless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.body(x) * (1 + timestep.reshape(-1, 1).to(x))


def test_a_network_without_such_a_place_is_refused_in_one_line():
    network = Timeless()
    with pytest.raises(UserError, match="Timeless has no module that makes something of the time alone") as caught:
        find_time_embedders(network, network, torch.randn(2, 6), torch.rand(2, dtype=torch.float64))
    assert "\n" not in str(caught.value)


# --- roles ------------------------------------------------------------------------------------------------------------


def loss_gradients(at: Told) -> list[Tensor]:
    """Of a pass with one second time while another pass, with another, was made before the backward."""
    parameters = at.student.parameters()
    loss = at.student.denoiser.velocity(at.x_t, at.t, at.conditioning, at.r).square().mean()
    with torch.no_grad():
        at.student.denoiser.velocity(at.x_t, at.t, at.conditioning, at.t)
    return list(torch.autograd.grad(loss, parameters))


def test_checkpointed_blocks_are_told_the_time_of_their_own_pass():
    """DiT makes something of its time in every block, and every block runs again in the backward pass."""
    pipeline = tiny_dit()
    with shaken(pipeline.transformer):
        recording = record(pipeline, class_labels=[1])
        found = []
        for checkpointing in (False, True):
            at = told(recording, gradient_checkpointing=checkpointing)
            stir(at.student)
            found.append(loss_gradients(at))
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-9, atol=1e-12)


def test_checkpointed_adapters_are_told_the_time_of_their_own_pass():
    from toys import adapter_role

    pipeline = tiny_dit()
    with shaken(pipeline.transformer):
        recording = record(pipeline, class_labels=[1])
        sites = sites_of(pipeline, class_labels=[1])
        conditioning = Conditioning(recording.marked, 1).select([0, 0])
        x, t = torch.randn(2, *recording.sample_shape), torch.tensor([0.5, 0.7], dtype=torch.float64)
        found = []
        for checkpointing in (False, True):
            backbone = Backbone(recording.network, 2, 2.0, gradient_checkpointing=checkpointing)
            student = adapter_role("student", backbone, recording)
            teacher = adapter_role("teacher", backbone, recording)
            attach_second_time(student, recording.component, sites, checkpointing, 0)
            stir(student)
            loss = student.denoiser.velocity(x, t, conditioning, 0.3 * t).square().mean()
            with torch.no_grad():
                teacher(x, t, conditioning)
            found.append(torch.autograd.grad(loss, student.parameters()))
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-4, atol=1e-7)


def test_an_average_holds_the_second_time_too():
    pipeline = tiny_dit()
    recording = record(pipeline, class_labels=[1])
    sites = sites_of(pipeline, class_labels=[1])
    roles = {name: make_role(name, recording, trainable=name == "student") for name in ("student", "ema")}
    for name, role in roles.items():
        attach_second_time(role, recording.component, sites, False, seed=len(name))
    assert not roles["ema"].parameters()
    follow(roles)
    ours, theirs = (role.added["second_time"].state_dict() for role in (roles["ema"], roles["student"]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    stir(roles["student"])
    update_average(roles["ema"], roles["student"], 0.75)
    head = roles["student"].added["second_time"].heads[0].weight
    torch.testing.assert_close(roles["ema"].added["second_time"].heads[0].weight, 0.25 * head)
