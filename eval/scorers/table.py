"""Every group of numbers for each sample, and what opens its scorer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from fewstep.errors import UserError
from fewstep.eval.features import Extractor
from fewstep.eval.scorers.aesthetic import open_aesthetic_scorer
from fewstep.eval.scorers.clip_score import open_clip_scorer
from fewstep.eval.scorers.colour import ColourScorer
from fewstep.eval.scorers.hps import open_hps_scorer
from fewstep.eval.scorers.kept import KeptScorer
from fewstep.eval.scorers.motion import MotionScorer
from fewstep.eval.scorers.pick import open_pick_scorer
from fewstep.eval.scorers.scorer import Scorer
from fewstep.eval.weights import Weights

#: By the group of ``--metrics``: what opens the scorer, from weights, on a device, with an extractor for motion, by a
#: backbone for the CLIP score.
SCORERS: Mapping[str, Callable[[Weights, torch.device | str, Extractor | None, str | None], Scorer]] = {
    "clip": lambda weights, device, extractor, backbone: open_clip_scorer(weights, device, backbone),
    "pick": lambda weights, device, extractor, backbone: open_pick_scorer(weights, device),
    "hps": lambda weights, device, extractor, backbone: open_hps_scorer(weights, device),
    "aesthetic": lambda weights, device, extractor, backbone: open_aesthetic_scorer(weights, device),
    "kept": lambda weights, device, extractor, backbone: KeptScorer(),
    "saturation": lambda weights, device, extractor, backbone: ColourScorer(),
    "motion": lambda weights, device, extractor, backbone: MotionScorer(extractor),
}


def open_scorer(
    group: str,
    weights: Weights,
    device: torch.device | str = "cpu",
    extractor: Extractor | None = None,
    backbone: str | None = None,
) -> Scorer:
    """The scorer of a group of ``--metrics``.

    Args:
        group: a key of ``SCORERS``. weights: where its files are looked for. extractor: of frames, for ``motion``.
        backbone: of the CLIP score; None takes the first whose weights are there.

    Raises:
        MissingWeightsError: a file of its weights is not there; the one sentence says which, and where to put it.
        UserError: there is no such group, or a file is damaged.
    """
    if group not in SCORERS:
        raise UserError(f"no scorer is called {group!r}: there are {', '.join(SCORERS)}")
    return SCORERS[group](weights, device, extractor, backbone)
