"""How fast a network is as it is, in channels-last, and compiled: timed in turn on one thread of a CPU.

python -m fewstep.eval.forms                seconds
python -m fewstep.eval.forms --compile      minutes: four graphs are compiled for each network
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from fewstep.networks.compiled import CompiledForms
from fewstep.teachers.loading import load_teacher

BATCHES = (8, 64)
_KINDS = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")


def networks() -> Iterator[tuple[str, nn.Module, Callable[[int], tuple[Tensor, ...]]]]:
    """Name, network, and what it is given for a batch: fashion-sd's, and a UNet of random weights at 16 px."""
    unet: Any = load_teacher("fashion-sd", False).unet.eval()
    size, width = unet.config.sample_size, unet.config.cross_attention_dim

    def prompted(batch: int) -> tuple[Tensor, ...]:
        sample = torch.randn(batch, unet.config.in_channels, size, size)
        return sample, torch.full((batch,), 500), torch.randn(batch, 9, width)

    yield "fashion-sd", unet, prompted
    down, up = _KINDS
    other: Any = UNet2DModel(16, block_out_channels=(64, 128, 192), down_block_types=down, up_block_types=up)
    yield "UNet of 16 px", other.eval(), lambda b: (torch.randn(b, 3, 16, 16), torch.full((b,), 500))


def measured(forms: dict[str, nn.Module], given: tuple[Tensor, ...], rounds: int) -> Iterator[tuple[str, list[float]]]:
    """Of each kind of pass the seconds of every form, medians of rounds in which all take their turn."""
    x, *rest = given

    def once(name: str, trained: bool) -> float:
        sample = x.contiguous(memory_format=torch.channels_last) if name == "channels-last" else x
        began = time.process_time()
        with torch.set_grad_enabled(trained):
            answer = forms[name](sample, *rest)[0]
            if trained:
                answer.square().mean().backward()
        return time.process_time() - began

    for kind, trained in (("without gradient", False), ("forward and backward", True)):
        for name in forms:
            once(name, trained)
        times = [[once(name, trained) for name in forms] for _ in range(rounds)]
        yield kind, [statistics.median(column) for column in zip(*times, strict=True)]


def main() -> None:
    """Print a line for each network, batch and kind of pass."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--compile", action="store_true", help="also compiled, which takes minutes")
    parser.add_argument("--rounds", type=int, default=9)
    told = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name, network, make in networks():
        forms = {"as it is": network, "channels-last": copy.deepcopy(network).to(memory_format=torch.channels_last)}
        for batch in BATCHES:
            if told.compile:  # a graph for this size alone, as a run has one
                forms["compiled"] = CompiledForms(f"batch_{batch}", say=print)(copy.deepcopy(network))
            for kind, (plain, *others) in measured(forms, make(batch), told.rounds):
                rest = (f"{form} {plain / took:.2f}x" for form, took in zip(list(forms)[1:], others, strict=True))
                print(f"{name}, batch {batch}, {kind}: {1e3 * plain:.1f} ms; {', '.join(rest)}", flush=True)


if __name__ == "__main__":
    main()
