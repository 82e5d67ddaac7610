"""What the papers' steps cost in forward passes F of one sample; :mod:`fewstep.eval.bench.floors` has what ours may.

A backward pass is 2 F, one to the inputs alone 1 F, a tangent 1 F. r: critic updates for each of the student; h: the
share of the network up to a GAN head's tap; q: the share of samples with two times; w: the teacher's calls under
guidance. What is drawn comes on top: :func:`drawn`.
"""

from __future__ import annotations

import math
from typing import Any

from fewstep.data.batch import Batch


def formula(method: Any, feature_share: float) -> tuple[str, float] | None:
    """What the steps of one student update cost by the papers, without what is :func:`drawn`: words, and F.

    None for a variant whose paper says no more than the derivation here does.

    Args:
        method: any of ours.
        feature_share: h.
    """
    return _FORMULAS[type(method).__name__](method, feature_share)


def drawn(method: Any, step: int, batch: Batch) -> float:
    """What one step costs beyond its formula because of what is drawn in it, in F.

    That are the student's earlier steps, its sample where it learns from what it samples, and samples with two times
    beyond the share q.
    """
    kind, first, end = type(method).__name__, 0, len(method.sampler.grid)
    if kind == "MultiStudent":
        before = method.config.steps_before
        return 0 if step < before else drawn(method.own, step - before, batch)
    if kind == "MfRae":
        stage, _ = method.config.stage_at(step)
        return 0 if stage == "cmt" else drawn(method.flow(stage, math.prod(batch.shape)), step, batch)
    if kind == "MeanFlow":
        apart = sum(batch.draws.coins("apart", method.config.apart)) / batch.size
        return (apart - method.config.apart) * _derivative_of(method)
    if kind == "ContinuousConsistency" and not method.matches(step):
        return 0
    if kind in ("RectifiedFlow", "PerFlow", "MdtDist") or (kind in _OWN_SAMPLES and method.config.data is not None):
        return 0
    if kind == "PhasedDmd":
        steps = method.phases[method.place(step)[0]].steps
        first, end = steps.start, steps.stop
    earlier = batch.draws.shared_integer("student_step", first, end)
    if kind in _OWN_SAMPLES:
        return earlier + 1
    return earlier * (1 + method.student_moves(step)) if kind == "Sid" else earlier


def period(method: Any) -> int:
    """Over how many steps the student is updated once."""
    if type(method).__name__ == "ContinuousConsistency":
        return method.config.critic_updates + 1 if method.config.matching else 1
    if type(method).__name__ == "SegmentedConsistency":
        return 2 if method.config.judged and method.config.alternate else 1
    return getattr(method.config, "critic_updates", 1)


def _formula_of_dmd2(method: Any, h: float) -> tuple[str, float] | None:
    config, r, w = method.config, method.config.critic_updates, method.teacher.calls
    if config.decoupled != "none" or config.f_divergence != "none" or config.swiftbrush:
        return None
    if method.tap is None:
        return "r (1 + 3) + 2 + 1 + w", 4 * r + 3 + w
    if config.gan_features == "teacher":  # only the head learns, so that nothing goes back through the features
        return "r (1 + 3 + 2h) + 2 + 1 + w + 2h", r * (4 + 2 * h) + 3 + w + 2 * h
    return "r (1 + 3 + 2h 3) + 2 + 1 + w + 2h", r * (4 + 6 * h) + 3 + w + 2 * h


def _formula_of_phased_dmd(method: Any, _h: float) -> tuple[str, float]:
    r, w = method.config.critic_updates, method.teacher.calls
    return "r (1 + 3) + 2 + 1 + w", 4 * r + 3 + w


def _formula_of_sid(method: Any, h: float) -> tuple[str, float]:
    r, w = method.config.critic_updates, method.teacher.calls
    trained, asked = method.critic_in_training.calls, method.critic.calls
    plain = r * (1 + 3 * trained) + 3 + 2 * w + 2 * asked
    if method.discriminator is None:
        return "r (1 + 3w) + 3 + 2w + 2w", plain
    return "r (1 + 3w + 2h 3) + 3 + 2w + 2w + 2h", plain + 6 * h * r + 2 * h


def _formula_of_consistency(method: Any, _h: float) -> tuple[str, float]:
    asked = {"none": 0, "euler": 1, "heun": 2}[method.config.solver]
    drawn = method.config.guidance_range is not None and not method.heeded
    w = 2 if drawn else method.teacher.calls
    return ("3 + 1", 4) if not asked else (f"3 + 1 + {asked}w", 4 + asked * w)


def _formula_of_mean_flow(method: Any, _h: float) -> tuple[str, float] | None:
    config, q = method.config, method.config.apart
    if config.variant != "mean_flow":
        return None
    derivative = _derivative_of(method) * q
    words = "3 + q" if _derivative_of(method) == 1 else "3 + 2q"
    if config.velocity == "teacher":
        return f"{words} + w", 3 + derivative + method.teacher.calls
    own = 0 if method.guide is None else 1 + (method.guide.kappa > 0)
    return f"{words} + {own}", 3 + derivative + own


def _formula_of_mf_rae(method: Any, h: float) -> tuple[str, float] | None:
    """That of its last stage, which most of its steps are."""
    stage, _ = method.config.stage_at(method.config.max_steps - 1)
    if stage != "cmt":
        return _formula_of_mean_flow(next(flow for (own, _), flow in method.flows.items() if own == stage), h)
    config = method.config
    walk = len(method.times) * (1 + (config.walk_solver == "heun")) - (config.walk_solver == "heun")
    return "3 + S w / m", 3 + walk * method.teacher.calls / config.pairs_per_walk


def _formula_of_mdt_dist(method: Any, _h: float) -> tuple[str, float]:
    w = method.teacher.calls
    asked = 1 if method.difference is None else method.difference.calls
    again = asked + (method.difference is None and not method.one_pass)
    if not method.config.distillation_weight:
        return f"3 + {again} + w", 3 + again + w
    return f"3 + {again} + w + 3 + 1 + {asked} + w", 7 + again + asked + w + method.distilled.calls


def _formula_of_free_flow(method: Any, _h: float) -> tuple[str, float]:
    size, w = method.config.batch_size, method.teacher.calls
    p, c = (part / size for part in method.config.parts(size))
    return "(p + c)(3 + w) + p + c (1 + 3)", (p + c) * (3 + w) + p + 4 * c


def _derivative_of(method: Any) -> int:
    """What MeanFlow's derivative costs beside a plain pass, in F: a tangent, a pass of its own, or further calls."""
    return method.difference.calls if method.difference is not None else 1 if method.one_pass else 2


def _formula_of_continuous_consistency(method: Any, _h: float) -> tuple[str, float] | None:
    config, w, r = method.config, method.teacher.calls, method.config.critic_updates
    if config.variant == "tcm":
        return "3 + 1", 4
    asked = {"exact": 2, "semi_continuous": 3, "discrete": 1, "backward": 1}.get(config.derivative, 2)
    words, passes = f"3 + {asked}" + (" + w" if config.velocity == "teacher" else ""), 3 + asked
    passes += w if config.velocity == "teacher" else 0
    if not config.matching:
        return words, passes
    return f"{words} + 3 + 1 + w + r (1 + 3)", passes + 4 + w + 4 * r


def _formula_of_segmented_consistency(method: Any, h: float) -> tuple[str, float] | None:
    config = method.config
    asked = {"euler": 1, "heun": 2}[config.solver]
    w = 2 if config.guidance_range is not None else method.teacher.calls
    if not config.judged:
        return f"3 + 1 + {asked}w", 4 + asked * w
    if len(method.stages) > 1:
        return None  # its stages cost different amounts
    if config.alternate:
        return f"3 + 1 + {asked}w + 2h + (1 + 1 + {asked}w + 2h)", 6 + 2 * asked * w + 4 * h
    return f"3 + 1 + {asked}w + 2h + 2h", 4 + asked * w + 4 * h


def walk_calls(method: Any) -> int:
    """How often the teacher is asked on its way through a window, unguided."""
    calls: int = method.config.solver_steps * {"euler": 1, "heun": 2}[method.config.solver]
    return calls


_FORMULAS = {
    "ContinuousConsistency": _formula_of_continuous_consistency,
    "Dmd2": _formula_of_dmd2,
    "MultiStudent": lambda method, h: None if method.config.steps_before else _formula_of_dmd2(method.own, h),
    "Disback": lambda method, h: _formula_of_dmd2(method.matchers[-1], h),
    "PhasedDmd": _formula_of_phased_dmd,
    "Sid": _formula_of_sid,
    "Consistency": _formula_of_consistency,
    "MeanFlow": _formula_of_mean_flow,
    "PerFlow": lambda method, _h: (f"3 + {walk_calls(method)}w", 3.0 + walk_calls(method) * method.teacher.calls),
    "SpeedUpNet": lambda method, _h: (f"3 + {method.config.asked_calls}w", 3.0 + 2 * method.config.asked_calls),
    "MdtDist": _formula_of_mdt_dist,
    "MfRae": _formula_of_mf_rae,
    "FreeFlow": _formula_of_free_flow,
    "RectifiedFlow": lambda _method, _h: ("3", 3.0),
    "SegmentedConsistency": _formula_of_segmented_consistency,
}
#: Methods that learn on the student's own samples where they have no others.
_OWN_SAMPLES = ("Consistency", "SegmentedConsistency")
