"""What a run generates for: prompts or class labels, encoded once, in a keyed order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fewstep.conditioning import Conditioning
from fewstep.draws import keyed_order
from fewstep.errors import UserError
from fewstep.recording import Recording

_MOST_CLASSES = 10**6  # a longer range is a slip of the keyboard, and its list would fill the memory


def read_prompts(path: str | Path) -> list[str]:
    """The non-empty lines of a UTF-8 file.

    Raises:
        UserError: the file is missing, not UTF-8, or holds no prompt.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise UserError(f"cannot read --prompts {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {path} is not UTF-8 text") from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise UserError(f"--prompts {path} holds no prompt; write one on each line")
    return prompts


def read_classes(text: str) -> list[int]:
    """Labels from ``0-9`` or ``1,5,7-8``.

    Raises:
        UserError: it is neither.
    """
    labels: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()) or int(high or low) < int(low):
            raise UserError(f"--classes takes labels such as 0-9 or 1,5,7, not {text!r}")
        if int(high or low) - int(low) >= _MOST_CLASSES:
            raise UserError(f"--classes {text} are more than {_MOST_CLASSES:,} labels")
        labels += range(int(low), int(high or low) + 1)
    return labels


class Conditions:
    """The conditions of a run, encoded once, and the keyed order in which they are used.

    Args:
        recording: of the teacher.
        prompts: for a text-conditioned teacher.
        labels: for a class-conditional one.
        device: where batches are put.

    Raises:
        UserError: the teacher asks for conditions of the other kind, or for any at all, or does not know a label.
    """

    def __init__(
        self,
        recording: Recording,
        prompts: Sequence[str] | None = None,
        labels: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        kind = recording.conditional
        given = "prompt" if prompts is not None else "label" if labels is not None else None
        if kind != given:
            wanted = {"prompt": "--prompts FILE", "label": "--classes 0-9", None: "neither --prompts nor --classes"}
            raise UserError(f"this teacher is conditioned on {kind or 'nothing'}: it takes {wanted[kind]}")
        self.kind = kind
        self.items: list[str] | list[int] | None = list(prompts) if prompts is not None else labels and list(labels)
        self._pool = recording.condition(prompts=self.items) if kind == "prompt" else None
        if kind == "label":
            # Beyond its table a network stops in the middle of a run, on a GPU with the whole process.
            count = recording.label_count()
            if beyond := [label for label in self.items if label < 0 or (count is not None and label >= count)]:
                known = "at least 0" if count is None else f"in 0..{count - 1}"
                raise UserError(f"this teacher's class labels are {known}, and {beyond[0]} is not")
            self._pool = recording.condition(labels=self.items)
        self._unconditional = recording.condition() if kind is None else None
        self._device = device

    def __len__(self) -> int:
        return len(self.items) if self.items is not None else 1

    def select(self, rows: Sequence[int]) -> Conditioning:
        """The conditioning of these items, on the device."""
        source = self._pool if self._pool is not None else self._unconditional
        rows = list(rows) if self._pool is not None else [0] * len(rows)
        return source.select(rows).to(device=self._device)

    def batch(self, seed: int, positions: Sequence[int], stream: str = "conditions") -> Conditioning:
        """The conditioning at these places of the run's endless, keyed stream."""
        return self.select([keyed_order(seed, stream, len(self), position) for position in positions])
