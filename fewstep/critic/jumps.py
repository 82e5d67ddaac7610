"""Adversarial consistency: heads on a frozen network tell the target's jumps from the student's (PCM; TSCD).

"Real" is where the consistency target arrives, not data. Both are noised alike to a time of the segment above, and seen
by the teacher's features there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.conditioning.ragged import AnyConditioning
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.prediction import add_noise, transition
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.diffusion.segments import draw_between
from fewstep.losses import adversarial
from fewstep.networks.features import FeatureTap
from fewstep.networks.head_role import HeadRole

#: The student's and the discriminator's loss by name.
LOSSES = {
    "hinge": (adversarial.hinge_generator_loss, adversarial.hinge_discriminator_loss),
    "non_saturating": (adversarial.generator_loss, adversarial.discriminator_loss),
}


class JumpDiscriminator:
    """Judges where jumps arrive.

    Args:
        role: with a head.
        tap: where its features are taken.
        schedule: of its network.
        loss: one of :data:`LOSSES`.
    """

    def __init__(self, role: HeadRole, tap: FeatureTap, schedule: NoiseSchedule, loss: str) -> None:
        self.role, self.tap, self.schedule = role, tap, schedule
        self._student_loss, self._own_loss = LOSSES[loss]

    def noised(self, end: Tensor, span: Tensor, draws: Draws, shape: tuple[int, ...]) -> JumpNoise:
        """The noise that both sides get: from ``end`` (B,) to a time at most ``span`` (B,) above it; sample ``shape``.

        Source: PCM's released code, where the time is drawn from the end of a phase to one phase further.
        """
        # A network says nothing at t = 0 itself.
        low = end.clamp(min=self.schedule.after(0.0))
        t = draw_between(self.schedule, low, torch.maximum(low, (end + span).clamp(max=1.0)), draws, "judged_time")
        return JumpNoise(self.schedule, end, t, draws.normal("judged_noise", shape))

    def logits(self, x: Tensor, noise: JumpNoise, conditioning: AnyConditioning) -> Tensor:
        """(B,) for jumps that arrived at ``x`` (B, ...)."""
        features = self.role.denoiser.features(noise.on(x), noise.t, conditioning, self.tap)
        logits: Tensor = self.role.added["head"](features)
        return logits

    def student_loss(self, fake: Tensor, noise: JumpNoise, conditioning: AnyConditioning) -> Tensor:
        """() with gradient to ``fake`` (B, ...), through the frozen network."""
        return self._student_loss(self.logits(fake, noise, conditioning))

    def own_loss(self, fake: Tensor, real: Tensor, noise: JumpNoise, conditioning: AnyConditioning) -> Tensor:
        """() with gradient to the head; ``fake`` and ``real`` (B, ...) get none."""
        with torch.no_grad():
            seen = [self.role.denoiser.features(noise.on(x), noise.t, conditioning, self.tap) for x in (real, fake)]
        head = self.role.added["head"]
        return self._own_loss(head(seen[0]), head(seen[1]))


class JumpNoise:
    """Noise for samples at ``end`` (B,) that takes them to ``t`` (B,); ``noise`` (B, ...) is unit normal."""

    def __init__(self, schedule: NoiseSchedule, end: Tensor, t: Tensor, noise: Tensor) -> None:
        self.t, self._noise = t, noise
        self._way = transition(schedule.coefficients(end), schedule.coefficients(t))

    def on(self, x: Tensor) -> Tensor:
        """``x`` (B, ...) noised."""
        return add_noise(x, self._noise, self._way)
