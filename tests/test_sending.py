"""Numbers of the host on a device that cannot be read here at all: meta tensors hold none."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from fewstep.conditioning.conditioning import Conditioning, Leaf
from fewstep.conditioning.ragged import join, with_others
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.noise_levels import NoiseLevels
from fewstep.diffusion.renoising import Renoiser
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import FlowSchedule
from fewstep.networks.experts import ExpertsDenoiser
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.sending import known, known_too, on_host, sent


def test_what_is_known_is_what_is_there() -> None:
    there = sent([1.0, 2.0], "meta", torch.float64)
    assert there.device.type == "meta" and on_host(there) is None
    host = torch.tensor([1.0, 2.0])
    assert on_host(known(there, host)) is host
    twice = known_too(lambda t: 2 * t, there)
    assert twice.device.type == "meta" and on_host(twice).tolist() == [2.0, 4.0]
    assert on_host(known_too(torch.add, there, torch.zeros(2, device="meta"))) is None
    there += 1
    assert on_host(there) is None
    assert on_host(host) is host


def test_nothing_is_kept_alive() -> None:
    there, host = torch.zeros(2, device="meta"), torch.zeros(2)
    known(there, host)
    alive = [weakref.ref(there), weakref.ref(host)]
    del there, host
    gc.collect()
    assert [one() for one in alive] == [None, None]


SCHEDULE = FlowSchedule()
TIMES = {
    "renoised": lambda draws: Renoiser(SCHEDULE, 0.1, 0.9, 3.0, anchor=0.3).times(draws, "x"),
    "uniform": lambda draws: NoiseLevels("uniform", 0.1, 0.9).draw(draws, "x", SCHEDULE),
    "grid": lambda draws: Sampler(SCHEDULE, (0.9, 0.4), "ode").times(1, torch.zeros(4, 2, device=draws.device)),
}


@pytest.mark.parametrize("name", TIMES)
def test_the_host_knows_the_times_of_a_step(name: str) -> None:
    there, here = (TIMES[name](Draws(0, 0, range(4), device)) for device in ("meta", "cpu"))
    assert there.device.type == "meta" and torch.equal(on_host(there), here)


class Expert:
    """Notes how many samples it is asked for."""

    schedule, prediction_type = SCHEDULE, "flow"

    def __init__(self) -> None:
        self.asked: list[int] = []

    def raw(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.asked.append(len(x_t))
        return x_t


def test_experts_are_chosen_without_a_read() -> None:
    def told(length: int, batch: int) -> Conditioning:
        return Conditioning({"text": Leaf(torch.zeros(batch, length), 1)}, batch)

    t = known(torch.zeros(4, device="meta"), torch.tensor([0.9, 0.1, 0.8, 0.7]))
    x_t = torch.zeros(4, 2, device="meta")
    for ragged in (False, True):
        noisy, clean = Expert(), Expert()
        denoiser = GuidedDenoiser(ExpertsDenoiser([(0.5, noisy), (0.0, clean)]), 2.0)
        conditioning = join([told(3, 2), told(5, 2)]) if ragged else told(3, 4)
        assert denoiser(x_t, t, with_others(conditioning, [told(3, 4)])).shape == x_t.shape
        assert (sum(noisy.asked), sum(clean.asked)) == (6, 2)
