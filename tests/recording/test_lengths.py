"""Guided calls in which the negative's length follows the prompt's, or a mask has another type beside the negative."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from synthetic import TraitPipeline, synthetic
from tiny_pipelines import tiny_kandinsky3

from fewstep.conditioning.conditioning import Conditioning
from fewstep.recording import record
from fewstep.recording.loop.call_parts import equal
from tests.recording.synthetic_parts import Traits

ORDER = "negative, positive"


@pytest.mark.soak
@pytest.mark.parametrize("negative", [None, "the dog the dog the dog"])
def test_kandinsky_3(negative: str | None) -> None:
    """Zeros as long as the prompt, or a negative prompt cut at its length; its masks are booleans when guided only."""
    call = {} if negative is None else {"negative_prompt": negative}
    recording = record(tiny_kandinsky3(), prompt="the cat", height=64, width=64, **call)
    report = recording.guidance
    assert report.order == ORDER and report.off_argument == ("guidance_scale", 1.0) and report.linear
    told = recording.negative().arguments()["encoder_hidden_states"]
    assert told.shape == recording.condition(["the cat"]).arguments()["encoder_hidden_states"].shape
    assert bool(told.any()) == (negative is not None)
    assert Conditioning.compatible(recording.negative(), recording.condition(["the cat"]))
    proof = recording.prove()
    assert proof.worst() <= 1e-6 and not any("to its negative's length" in line for line in proof.describe())


class _Cut(TraitPipeline):
    """The negative is cut or padded to the prompt's length; there is a mask, of another type where it is guided."""

    types: tuple[torch.dtype, torch.dtype] = (torch.int64, torch.bool)

    def _answers(self, x: Any, t: Any, following: Any, told: list[Any]) -> Any:
        alone, beside = self.types
        if len(told) == 1:
            text = told[0][0]
            return super()._answers(x, t, following, [(text, torch.ones(text.shape[:2], dtype=alone))])
        length = told[1 if not self.traits.positive_first else 0][0].shape[1]
        fitted = [
            torch.nn.functional.pad(text, (0, 0, 0, max(length - text.shape[1], 0)))[:, :length] for text, _ in told
        ]
        return super()._answers(x, t, following, [(text, torch.ones(text.shape[:2], dtype=beside)) for text in fitted])


@pytest.mark.parametrize("negative", ["empty", "zeros", "stock"])
@pytest.mark.parametrize("positive_first", [False, True])
@pytest.mark.parametrize("types", [(torch.int64, torch.bool), (torch.bool, torch.int64), (torch.int32, torch.int64)])
def test_masks_of_another_type_beside_the_negative(
    negative: str, positive_first: bool, types: tuple[torch.dtype, torch.dtype]
) -> None:
    class Cut(_Cut):
        pass

    Cut.types = types
    traits = Traits(text="longest", guidance="sequential", negative=negative, positive_first=positive_first)
    recording = record(Cut(**synthetic(traits).components), prompt="a cat")
    assert Conditioning.compatible(recording.negative(), recording.condition(["a cat"]))
    assert recording.guidance.order == ("positive, negative" if positive_first else ORDER)
    assert recording.prove().worst() <= 1e-6


def test_numbers_that_count_are_equal_whatever_their_type() -> None:
    ones = torch.ones(1, 3)
    assert equal(ones.bool(), ones.long()) and equal(ones.int(), ones.long())
    assert not equal(ones.bool(), torch.tensor([[True, True, False]]).long())
    assert not equal(ones, ones.long()) and not equal(ones, ones.double())
    complexes = torch.complex(ones, ones)
    assert equal(complexes, complexes.clone()) and not equal(complexes, ones)
