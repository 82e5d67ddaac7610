"""Every method leads each sample away from that sample's own negative, which comes with the batch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from toys import labels

from fewstep.conditioning.ragged import with_others
from fewstep.data.batch import Batch, Pairs, Real
from fewstep.diffusion.draws import Draws
from fewstep.training.method import Method, Turn
from tests.trainers import (
    test_dmd2_relatives,
    test_mean_flow,
    test_perflow,
    test_snoopi,
    toy_any_flow,
    toy_consistency,
    toy_continuous,
    toy_flash_dmd,
    toy_segmented,
    toy_sid,
    toy_twin_flow,
)


def of(toy) -> Callable[..., Method]:
    """A toy's method under guidance with these settings."""
    make = getattr(toy, "method", None) or toy.vector_method
    return lambda **settings: make(toy.config(out="out", **settings), guidance_scale=3.0)


def dmd2(**settings) -> Method:
    return test_dmd2_relatives.method(test_dmd2_relatives.config("out", critic_updates=1, **settings))


#: Methods that are guided.
METHODS = {
    "dmd2": dmd2,
    "decoupled": lambda: dmd2(decoupled="hybrid"),
    "swiftbrush": lambda: dmd2(swiftbrush=True),
    "snoopi": lambda: test_snoopi.method(test_snoopi.config("out", critic_updates=1)),
    "sid": lambda: toy_sid.vector_method(toy_sid.config("out", guidance_scale=3.0, critic_updates=1)),
    "flash_dmd": lambda: toy_flash_dmd.method(toy_flash_dmd.config("out", gan_weight=0.0)),
    "mean_flow": lambda: test_mean_flow.method(guidance_scale=3.0),
    "mean_flow on data": lambda: test_mean_flow.method(
        settings=test_mean_flow.config(data="x", omega=2.0, kappa=0.3, guidance_t_max=1.0, label_drop=0.0)
    ),
    "any_flow": of(toy_any_flow),
    "any_flow on data": lambda: of(toy_any_flow)(data="x", velocity="data"),
    "twin_flow": of(toy_twin_flow),
    "consistency": of(toy_consistency),
    "continuous_consistency": of(toy_continuous),
    "segmented_consistency": of(toy_segmented),
    "perflow": test_perflow.method,
    "perflow, guided later": lambda: test_perflow.method(guidance="kept", label_drop=0.7),
}


def batch(nulls: list[float], step: int) -> Batch:
    """Four samples with negatives of their own."""
    told = with_others(labels([1.0] * 4), [labels(nulls, None)])
    x0 = Draws(0, 7, range(4)).normal("x0", (6,))
    return Batch(4, (6,), told, Draws(0, step, range(4)), Real(x0, told), False, Pairs(x0, x0, told), per_step=4)


def updates(method: Method, nulls: list[float]) -> list[Tensor]:
    """What goes backward in the turns of two steps."""
    found: list[Tensor] = []
    for step in (0, 1):
        for turn in method.turns(step, batch(nulls, step)):
            if isinstance(turn, Turn):  # its tensors are gone when the next one is asked for
                found += [piece.detach().clone() for pair in turn.backward for piece in pair if piece is not None]
    return found


@pytest.mark.parametrize("name", METHODS)
def test_two_samples_that_swap_their_negatives_are_trained_otherwise(name: str):
    nulls = [2.0, -3.0, 0.5, 4.0]
    one, again, swapped = (updates(METHODS[name](), given) for given in (nulls, nulls, [*nulls[1::-1], *nulls[2:]]))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, swapped, strict=True))
