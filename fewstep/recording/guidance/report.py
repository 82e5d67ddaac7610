"""What was seen of a pipeline's guidance, and how it is told to people."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.diffusion.rescaling import Rescaling
from fewstep.recording.guidance.weighing import Weighing


@dataclass(frozen=True)
class GuidanceReport:
    """What the recorder found out about a pipeline's guidance.

    Its formula is reported, not used: fewstep guides by its own. What was found of scales and rescaling is used.

    Attributes:
        off_argument: the keyword argument and value that switch classifier-free guidance off; None: there is none.
        argument_scale: the pipeline's default (or the caller's value) of that argument, None where unknown.
        embedded: the network is told a guidance value; that is conditioning, recorded at the caller's value.
        calls: network calls in a guided step (1: one call of both halves); 0 without classifier-free guidance.
        order: "negative, positive" or "positive, negative".
        formula: (n, p) with guided = n * negative + p * positive at `formula_scale`; None: not linear, or not seen.
        formula_scale: the pipeline's value at which the formula was fitted.
        linear: whether the guided answer is a linear combination; None: not seen.
        offset: fewstep's guidance_scale is the pipeline's value plus this (0, or 1 for pos + w (pos - neg)).
        remark: what could not be seen, in words.
        expert_formulas: `formula` of each of several networks that are split by time, in the same guided call.
        expert_scales: w of neg + w (pos - neg) of each of them in the pipeline's call as it was given; 1 is off.
        weighing: how the answers are weighed, of a pipeline that is told pictures or rescales the sum; None: not seen.
        pictures: what each of its answers beside the positive one is told of the item's picture, in words.
    """

    off_argument: tuple[str, float] | None = None
    argument_scale: float | None = None
    embedded: bool = False
    calls: int = 0
    order: str | None = None
    formula: tuple[float, float] | None = None
    formula_scale: float | None = None
    linear: bool | None = None
    offset: float | None = None
    remark: str = ""
    expert_formulas: tuple[tuple[float, float], ...] = ()
    expert_scales: tuple[float, ...] = ()
    weighing: Weighing | None = None
    pictures: tuple[str, ...] = ()

    @property
    def later_scales(self) -> tuple[float, ...]:
        """The scales between the further answers; () of at most two answers."""
        return () if self.weighing is None else self.weighing.scales[1:]

    @property
    def rescaling(self) -> Rescaling | None:
        """What is done to the weighed sum; None: nothing, or nothing that was understood."""
        return None if self.weighing is None else self.weighing.rescaled

    def describe(self) -> str:
        """One line for people."""
        embedded = "embedded guidance is part of the conditioning; " if self.embedded else ""
        if self.off_argument is None:
            return f"{embedded}no classifier-free guidance" + (f" ({self.remark})" if self.remark else "")
        name, value = self.off_argument
        text = f"{embedded}off at {name}={value:g}; {self.calls} call{'s' * (self.calls != 1)}, {self.order}"
        if self.formula is not None:
            text += f"; {self.formula[0]:.4g}*negative + {self.formula[1]:.4g}*positive at {self.formula_scale:g}"
        elif self.linear is False and self.weighing is None:
            text += "; the pipeline's sum is not linear (fewstep's is)"
        if self.weighing is not None:
            text += f"; {self.weighing.describe()}"
        for number, words in enumerate(self.pictures, start=2):
            text += f"; answer {number} is told {words}"
        if self.expert_scales:
            text += f"; scales of the networks {', '.join(f'{w:g}' for w in self.expert_scales)}"
        return text + (f"; {self.remark}" if self.remark else "")
