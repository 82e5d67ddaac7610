"""Entries of a sample that the network is never told: every answer says that they are 0, and no loss sees them."""

import pytest
import torch

from fewstep.diffusion.prediction import add_noise, to_velocity
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.recording import record
from tests.recording.picture_pipeline import items_of, picture_pipeline


@pytest.fixture(scope="module")
def recording():
    return record(picture_pipeline("frame_mixed_in"), items=items_of("frame_mixed_in"))


def test_the_answer_is_nothing_where_the_network_is_told_nothing(recording):
    read = recording.recipe.read
    assert not read[:, 0].any() and read[:, 1:].all()
    denoiser = NetworkDenoiser(recording.network, recording.recipe, recording.schedule, recording.prediction_type)
    told = recording.condition(items=items_of("frame_mixed_in"))
    noise = torch.randn(2, *recording.sample_shape)
    t = torch.tensor([0.3, 0.9], dtype=torch.float64)
    x0 = denoiser(noise, t, told)
    assert x0[:, ~read].abs().max() < 1e-6
    plain = recording.recipe.call(recording.network, noise, recording.schedule.timestep(t), told)
    torch.testing.assert_close(denoiser.raw(noise, t, told)[:, read], plain[:, read])
    assert (denoiser.raw(noise, t, told)[:, ~read] - plain[:, ~read]).abs().min() > 0


def test_a_flow_loss_of_clean_samples_has_no_part_of_them(recording):
    """What is trained on are samples of the network itself or of its teacher, which are 0 there."""
    read = recording.recipe.read
    denoiser = NetworkDenoiser(recording.network, recording.recipe, recording.schedule, recording.prediction_type)
    told = recording.condition(items=items_of("frame_mixed_in"))
    noise, t = torch.randn(2, *recording.sample_shape), torch.tensor([0.3, 0.9], dtype=torch.float64)
    clean = torch.randn(2, *recording.sample_shape) * read
    x_t = add_noise(clean, noise, recording.schedule.coefficients(t))
    answer = denoiser.raw(x_t, t, told)
    velocity = to_velocity(answer, recording.prediction_type, x_t, recording.schedule, t)
    torch.testing.assert_close(velocity[:, ~read], noise[:, ~read], rtol=1e-5, atol=1e-5)
    weight = recording.network.leave.weight
    (whole,) = torch.autograd.grad((velocity - (noise - clean)).square().sum(), weight, retain_graph=True)
    (part,) = torch.autograd.grad((velocity - (noise - clean))[:, read].square().sum(), weight)
    torch.testing.assert_close(whole, part, rtol=1e-5, atol=1e-5)
    assert part.abs().max() > 0
