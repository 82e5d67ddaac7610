"""A pipeline under observation: its call with guidance off, run and watched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

from torch import Tensor

from fewstep.recording.call.invocation import Invocation
from fewstep.recording.errors import RecordingError
from fewstep.recording.watch.observation import Observation, Stub
from fewstep.recording.watch.observe import observe


class Watching(TypedDict, total=False):
    """The options of :func:`observe`."""

    steps: int | None
    before: str | None
    skip: int
    replace: Callable[[int, Tensor], Tensor] | None
    stub: Stub | None
    stop_at_decode: bool
    decoder_input: Tensor | None
    x0: bool
    set_up: Callable[[Any], None] | None


@dataclass(frozen=True, eq=False)
class Subject:
    """A pipeline and the call under which it is observed.

    Attributes:
        pipeline: the pipeline.
        invocation: its call, prompts or labels apart.
        off: the changes to the call that switch guidance off; empty where it is off, or as long as they are unknown.
        loop: the components that its loop calls, of whose calls alone an observation holds what was said; None: as long
            as they are unknown.
    """

    pipeline: Any
    invocation: Invocation
    off: dict[str, Any]
    loop: tuple[str, ...] | None = None

    def __str__(self) -> str:
        """The pipeline's class, for messages."""
        return type(self.pipeline).__name__

    def call(
        self,
        count: int,
        items: Sequence[Any] | None = None,
        changes: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> dict[str, Any]:
        """The keyword arguments of a call with guidance off.

        Args:
            count: steps that it makes.
            items: prompts, labels or items; None: the recording's own, once.
            changes: to the call, which may switch guidance on again.
            seed: of the generator that the pipeline is given.
        """
        items = [self.invocation.item] if items is None else list(items)
        return self.invocation.arguments(items, count, seed, **{**self.off, **(changes or {})})

    def run(
        self,
        count: int,
        items: Sequence[Any] | None = None,
        changes: Mapping[str, Any] | None = None,
        seed: int = 0,
        **watching: Unpack[Watching],
    ) -> Observation:
        """Make the call of :meth:`call` under observation; ``watching`` goes to :func:`observe`.

        With items the global random state is seeded, too: some pipelines draw from it what they tell their network.

        Raises:
            RecordingError: the pipeline itself failed; an item is named.
        """
        call = self.call(count, items, changes, seed)
        if self.invocation.conditional != "item":
            return observe(self.pipeline, call, loop=self.loop, **watching)
        try:
            return observe(self.pipeline, call, seed=seed, loop=self.loop, **watching)
        except RecordingError as error:
            raise RecordingError(f"{(items or [self.invocation.item])[0]}: {error}") from error.__cause__
