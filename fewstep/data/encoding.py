"""Encoding what a run generates for, each item alone, as users sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from fewstep.conditioning.conditioning import Conditioning
from fewstep.conditioning.outside import as_beside
from fewstep.errors import UserError
from fewstep.recording import Recording
from fewstep.recording.watch.cut_texts import cut_texts


@dataclass
class CutPrompts:
    """How many prompts were longer than the encoders read.

    Attributes:
        count: of prompts that at least one tokenizer cut.
        limits: of the tokenizers that did, the number of tokens that they keep.
    """

    count: int = 0
    limits: dict[str, int] = field(default_factory=dict)

    def note(self, among: int) -> str:
        """One line for people; "" where none was cut of the ``among`` that were encoded."""
        limits = ", ".join(f"{name} at {limit} tokens" for name, limit in sorted(self.limits.items()))
        return f"{self.count} of {among} prompts are longer than the encoder reads and were cut ({limits})" * bool(
            limits
        )


def joined_cuts(cuts: Sequence[CutPrompts]) -> CutPrompts:
    """Those of several processes as one."""
    joined = CutPrompts()
    for cut in cuts:
        joined.count += cut.count
        joined.limits |= cut.limits
    return joined


def encode_each(
    recording: Recording, items: Sequence[Any], cut: CutPrompts, bar: tqdm[Any] | None = None, draws: int = 1
) -> Iterator[Conditioning]:
    """The conditioning of each prompt, label or item, encoded alone, on the CPU; what was cut is counted in ``cut``.

    Of ``draws`` seeds, those of one item one after the other. The bar moves with the items.
    """
    for item in items:
        for seed in range(draws):
            with cut_texts(recording.pipeline) as limits:
                encoded = encode_one(recording, item, seed)
            cut.count += bool(limits) and not seed
            cut.limits |= limits
            yield encoded.to("cpu")
        if bar is not None:
            bar.update()


def encode_one(recording: Recording, item: Any, seed: int = 0) -> Conditioning:
    """The conditioning of a prompt, a label or an item; of an item with its further answers, which are its own.

    Args:
        recording: of the teacher.
        item: which.
        seed: of what the pipeline draws for an item.

    Raises:
        UserError: the pipeline does not take an item, or makes NaN of it; the item is named.
    """
    if recording.conditional != "item":
        (told,) = recording.condition_each(**{f"{recording.conditional}s": [item]})
        return told
    try:
        (told,), (others,) = recording.draw_each([item], seed), recording.negative_each([item], seed)
    except UserError as error:
        named = str(error).startswith(str(item))
        raise UserError(str(error) if named else f"{item}: {error}") from error
    return Conditioning(told.tree, 1, [as_beside(told, other) for other in others])


def encoding_bar(recording: Recording, count: int, *, done: int = 0, disable: bool = False) -> tqdm[Any]:
    """The progress bar of encoding; short work shows none."""
    return tqdm(total=count, initial=done, desc="encode", unit=recording.conditional or "it", delay=2, disable=disable)


def tensors_of(told: Conditioning) -> list[Tensor]:
    """All tensors of a conditioning, those of its further answers behind its own."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor.cpu())
        return tensor

    told.map_tensors(note)
    return found
