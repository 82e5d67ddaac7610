"""Samples of several shapes in one batch: each is answered as if it were alone; gradients, features and adapters."""

from __future__ import annotations

import pytest
import torch
from tiny_pipelines import tiny_flow
from torch import Tensor
from toys import adapter_role

from fewstep.conditioning.conditioning import Conditioning, Leaf
from fewstep.conditioning.ragged import RaggedConditioning, in_groups, join, with_others
from fewstep.networks.adapters import Backbone
from fewstep.networks.features import find_tap
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.recording import Recording, record
from fewstep.recording.watch.shake import shaken


def text(length: int, value: float) -> Conditioning:
    return Conditioning({"text": Leaf(torch.full((1, length), value), rows=1), "scale": Leaf(2)}, 1)


def total(x_t: Tensor, t: Tensor, conditioning: Conditioning, end: Tensor | None = None) -> Tensor:
    """x0 = x_t * the sum of a sample's text + t - end."""
    assert isinstance(conditioning, Conditioning) and conditioning.batch_size == len(x_t) == len(t)
    span = t if end is None else t - end
    return x_t * conditioning.arguments()["text"].sum(1, keepdim=True) + span[:, None].float()


ITEMS = [text(2, 1.0), text(3, 2.0), text(2, 3.0), text(5, 4.0), text(3, 5.0)]
X = torch.arange(10.0).reshape(5, 2)
T = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)


def alone() -> Tensor:
    return torch.cat([total(X[i : i + 1], T[i : i + 1], item) for i, item in enumerate(ITEMS)])


def test_items_of_one_shape_form_a_plain_batch() -> None:
    joined = join([ITEMS[0], ITEMS[2]])
    assert isinstance(joined, Conditioning) and joined.arguments()["text"][:, 0].tolist() == [1.0, 3.0]


def test_groups_stand_in_the_order_of_their_first_samples() -> None:
    joined = join(ITEMS)
    assert [rows for rows, _ in joined.groups] == [(0, 2), (1, 4), (3,)] and joined.batch_size == 5
    again = join([joined.select([0, 1]), joined.select([2, 3, 4])])
    assert [rows for rows, _ in again.groups] == [rows for rows, _ in joined.groups]
    assert isinstance(joined.select([4, 1]), Conditioning)
    with pytest.raises(IndexError, match=r"0\.\.4"):
        joined.select([5])
    with pytest.raises(ValueError, match="every place once"):
        RaggedConditioning([((0, 2), join([ITEMS[0], ITEMS[2]]))])


def test_every_sample_is_answered_as_if_it_were_alone_and_stays_at_its_place() -> None:
    torch.testing.assert_close(in_groups(total, X, T, join(ITEMS)), alone())
    order = [3, 0, 4, 1, 2]
    moved = in_groups(total, X[order], T[order], join(ITEMS).select(order))
    torch.testing.assert_close(moved, alone()[order])
    halves = [in_groups(total, X[rows], T[rows], join(ITEMS).select(rows)) for rows in ([0, 1], [2, 3, 4])]
    torch.testing.assert_close(torch.cat(halves), alone())
    with pytest.raises(ValueError, match="for 5 samples, x for 3"):
        in_groups(total, X[:3], T[:3], join(ITEMS))
    ends = 0.1 * T.flip(0)
    torch.testing.assert_close(in_groups(total, X, T, join(ITEMS), ends), alone() - ends[:, None].float())


@pytest.mark.parametrize("length", [1, 3])
def test_guidance_of_a_ragged_batch(length: int) -> None:
    """A negative that has the length of some samples shares their call."""
    calls: list[int] = []

    def counted(x_t: Tensor, t: Tensor, conditioning: Conditioning, end: Tensor | None = None) -> Tensor:
        calls.append(len(x_t))
        return total(x_t, t, conditioning)

    negative = text(length, -1.0).select([0] * 5)
    guided = GuidedDenoiser(counted, 3.0)(X, T, with_others(join(ITEMS), [negative]))
    told = in_groups(total, X, T, negative)
    torch.testing.assert_close(guided, told + 3.0 * (alone() - told))
    assert sorted(calls) == ([1, 2, 2, 5] if length == 1 else [1, 2, 7])


@pytest.fixture(scope="module")
def recording() -> Recording:
    pipeline = tiny_flow()
    with shaken(pipeline.transformer):
        yield record(pipeline, prompt="the cat", height=16, width=16, max_sequence_length=8)


def ragged_text(recording: Recording) -> list[Conditioning]:
    """Two prompts, the texts cut to several lengths: the network takes any."""
    lengths = [9, 20, 9, 14]
    items = []
    for length, item in zip(lengths, recording.condition_each(prompts=["a", "b c", "the cat", "d"]), strict=True):
        whole = item.tree["encoder_hidden_states"].value
        items.append(Conditioning({**item.tree, "encoder_hidden_states": Leaf(whole[:, :length], 1)}, 1))
    return items


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_learns_from_a_ragged_batch_what_it_learns_from_its_samples(
    recording: Recording, checkpointing: bool
) -> None:
    network = recording.network.double()
    try:
        backbone = Backbone(network, 4, 8.0, dtype=torch.float64, gradient_checkpointing=checkpointing)
        student = adapter_role("student", backbone, recording)
        items = [item.to(dtype=torch.float64) for item in ragged_text(recording)]
        x = torch.randn(4, *recording.sample_shape, dtype=torch.float64, requires_grad=True)
        t = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
        weight = torch.randn(4, *recording.sample_shape, dtype=torch.float64)
        inputs = [x, *student.parameters()]
        batch = student(x, t, join(items))
        together = torch.autograd.grad((batch * weight).sum(), inputs, allow_unused=True)
        parts = [student(x[i : i + 1], t[i : i + 1], item) for i, item in enumerate(items)]
        apart = torch.autograd.grad((torch.cat(parts) * weight).sum(), inputs, allow_unused=True)
    finally:
        recording.network.float()
    torch.testing.assert_close(batch, torch.cat(parts))
    pairs = [(a, b) for a, b in zip(together, apart, strict=True) if b is not None]
    assert len(pairs) > 10 and all(float(b.abs().max()) > 0 for _, b in pairs[:1])
    for a, b in pairs:
        torch.testing.assert_close(a, b)


def test_features_of_a_ragged_batch(recording: Recording) -> None:
    backbone = Backbone(recording.network, 4, 8.0)
    denoiser = adapter_role("critic", backbone, recording).denoiser
    items = ragged_text(recording)
    x = torch.randn(4, *recording.sample_shape, generator=torch.Generator().manual_seed(7))
    t = torch.full((4,), 0.5, dtype=torch.float64)
    taps = [find_tap(denoiser.network, lambda s, i=i: denoiser.raw(s, t[:2], i.select([0, 0])), x[:2]) for i in items]
    assert all(tap == taps[0] for tap in taps)
    seen = denoiser.features(x, t, join(items), taps[0])
    apart = [denoiser.features(x[i : i + 1], t[i : i + 1], item, taps[0]) for i, item in enumerate(items)]
    torch.testing.assert_close(seen, torch.cat(apart), rtol=1e-5, atol=1e-5)
