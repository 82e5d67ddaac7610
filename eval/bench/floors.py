"""What a step of each method may cost: network calls by role and per sample of the batch, worked out by hand.

The method's own steps are counted where they run, and compared with this; each guided pair counts as two. Passes that
end early at a GAN head's tap are listed as ``<role>/features``. Tests and ``fewstep bench --part calls`` read it.

Beside it stand the formulas of the papers' steps in forward passes F of one sample (a backward pass 2 F, one to the
inputs alone 1 F, a tangent 1 F): r critic updates for each of the student, h the share of the network up to the tap, q
the share of samples with two times, w the teacher's calls under guidance. What is drawn comes on top: :func:`drawn`.
"""

from __future__ import annotations

from typing import Any

from fewstep.data.batch import Batch
from fewstep.programs.planning.call_counts import Calls

Cost = dict[str, Calls]


def declared(method: Any, step: int, batch: Batch) -> Cost:
    """What a step costs where it is not logged, without what is zero.

    Args:
        method: any of ours.
        step: of the run.
        batch: one of its own: what is drawn from it is drawn again in the step.
    """
    cost = _BY_CLASS[type(method).__name__](method, step, batch)
    return {name: calls for name, calls in cost.items() if calls != Calls()}


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
    if kind == "MfRae":
        stage, _ = method.config.stage_at(step)
        return 0 if stage == "cmt" else drawn(method.flows[stage], step, batch)
    if kind == "MeanFlow":
        apart = sum(batch.draws.coins("apart", method.config.apart)) / batch.size
        return (apart - method.config.apart) * _derivative_of(method)
    if kind == "ContinuousConsistency" and not method.matches(step):
        return 0
    if kind in ("RectifiedFlow", "PerFlow") or (kind in _OWN_SAMPLES and method.config.data is not None):
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
        return _formula_of_mean_flow(method.flows[stage], h)
    config = method.config
    walk = len(method.times) * (1 + (config.walk_solver == "heun")) - (config.walk_solver == "heun")
    return "3 + S w / m", 3 + walk * method.teacher.calls / config.pairs_per_walk


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


_FORMULAS = {
    "ContinuousConsistency": _formula_of_continuous_consistency,
    "Dmd2": _formula_of_dmd2,
    "PhasedDmd": _formula_of_phased_dmd,
    "Sid": _formula_of_sid,
    "Consistency": _formula_of_consistency,
    "MeanFlow": _formula_of_mean_flow,
    "PerFlow": lambda method, _h: (f"3 + {_walk_calls(method)}w", 3.0 + _walk_calls(method) * method.teacher.calls),
    "MfRae": _formula_of_mf_rae,
    "FreeFlow": _formula_of_free_flow,
    "RectifiedFlow": lambda _method, _h: ("3", 3.0),
    "SegmentedConsistency": _formula_of_segmented_consistency,
}
#: Methods that learn on the student's own samples where they have no others.
_OWN_SAMPLES = ("Consistency", "SegmentedConsistency")


def _dmd2(method: Any, step: int, batch: Batch) -> Cost:
    """What one step costs; the student's own earlier steps count too."""
    config, earlier = method.config, batch.draws.shared_integer("student_step", 0, len(method.sampler.grid))
    student_turn = step % config.critic_updates == 0
    calls = {"student": Calls(no_grad=earlier + 1), "critic": Calls(to_parameters=1)}
    if student_turn:
        asked = {"none": method.teacher.calls}.get(config.decoupled, 3 + (config.decoupled_normalizer == "guided"))
        followed = method.teacher.calls if config.swiftbrush else 1
        calls = {"student": Calls(no_grad=earlier, to_parameters=1), "teacher": Calls(no_grad=asked)}
        calls["critic"] = Calls(no_grad=followed, to_parameters=1)
    if method.tap is not None:
        weighs, pulls = student_turn and config.f_divergence != "none", student_turn and config.gan_weight > 0
        calls["critic/features"] = Calls(no_grad=int(weighs), to_parameters=2, to_inputs=int(pulls))
    return calls


def _phased_dmd(method: Any, step: int, batch: Batch) -> Cost:
    """What one step costs; all earlier steps of the student count too."""
    number, before = method.place(step)
    steps, critic = method.phases[number].steps, method.critics[number].name
    earlier = batch.draws.shared_integer("student_step", steps.start, steps.stop)
    if before % method.config.critic_updates:
        return {"student": Calls(no_grad=earlier + 1), critic: Calls(to_parameters=1)}
    calls = {"student": Calls(no_grad=earlier, to_parameters=1), critic: Calls(no_grad=1, to_parameters=1)}
    return calls | {"teacher": Calls(no_grad=method.teacher.calls)}


def _sid(method: Any, step: int, batch: Batch) -> Cost:
    """What one step costs; the student's own earlier steps count in both turns."""
    earlier = batch.draws.shared_integer("student_step", 0, len(method.sampler.grid))
    calls = {"student": Calls(no_grad=earlier + 1), "critic": Calls(to_parameters=method.critic_in_training.calls)}
    moves = method.student_moves(step)
    if moves:
        walks = 1 if method.config.shared_walk else 2
        calls["student"] = Calls(no_grad=walks * earlier + 1, to_parameters=1)
        calls["critic"] = Calls(to_parameters=method.critic_in_training.calls, to_inputs=method.critic.calls)
        calls["teacher"] = Calls(to_inputs=method.teacher.calls)
    if method.discriminator is not None:
        judged = moves and method.judge(step) is not None
        calls["critic/features"] = Calls(to_parameters=2, to_inputs=1 if judged else 0)
    return calls


def _consistency(method: Any, step: int, batch: Batch) -> Cost:
    """What one step costs; without real data the student's own sample counts too."""
    sampled = 0
    if method.config.data is None:
        sampled = batch.draws.shared_integer("student_step", 0, len(method.sampler.grid)) + 1
    of_solver = {"none": 0, "euler": 1, "heun": 2}[method.config.solver]
    drawn = method.config.guidance_range is not None and not method.heeded
    guided = 2 if drawn else method.teacher.calls
    own = method.target is method.student
    calls = {"student": Calls(no_grad=sampled + own, to_parameters=1)}
    calls |= {} if own else {"target": Calls(no_grad=1)}
    return calls | ({"teacher": Calls(no_grad=of_solver * guided)} if of_solver else {})


def _segmented_consistency(method: Any, step: int, batch: Batch) -> Cost:
    """What one step costs; without real data the student's own sample counts too."""
    config, (moves, judge_moves) = method.config, method.moves(step)
    sampled = 0
    if config.data is None:
        sampled = batch.draws.shared_integer("student_step", 0, len(method.sampler.grid)) + 1
    guided = 2 if config.guidance_range is not None else method.teacher.calls
    own = method.target is method.student
    calls = {"student": Calls(no_grad=sampled + own + (not moves), to_parameters=int(moves))}
    calls |= {} if own else {"target": Calls(no_grad=1)}
    calls["teacher"] = Calls(no_grad={"euler": 1, "heun": 2}[config.solver] * guided)
    if method.judged(step):
        calls["discriminator/features"] = Calls(no_grad=2 * judge_moves, to_inputs=int(moves))
    return calls


def _mean_flow(method: Any, step: int, batch: Batch) -> Cost:
    """What one step costs: what is only asked for where the two times differ is not asked for elsewhere."""
    config, alpha = method.config, method.config.alpha(step)
    apart = sum(batch.draws.coins("apart", config.apart)) / batch.size
    own = 0 if method.guide is None else 1 + (method.guide.kappa > 0)
    own += apart * ((0 < alpha < 1) + (config.variant == "improved"))
    derived = apart * (alpha == 0)
    if method.difference is not None:
        calls = {"student": Calls(no_grad=own + derived * method.difference.calls, to_parameters=1)}
    elif method.one_pass:
        calls = {"student": Calls(no_grad=own, to_parameters=1 - derived, jvp_to_parameters=derived)}
    else:
        calls = {"student": Calls(no_grad=own, to_parameters=1, jvp=derived)}
    return calls | ({"teacher": Calls(no_grad=method.teacher.calls)} if config.velocity == "teacher" else {})


def _mf_rae(method: Any, step: int, batch: Batch) -> Cost:
    """What one step costs: that of MeanFlow, or, in mid-training, a pass of the student and a share of a walk."""
    stage, _ = method.config.stage_at(step)
    if stage != "cmt":
        return _mean_flow(method.flows[stage], step, batch)
    heun = method.config.walk_solver == "heun"
    walks = -(-batch.size // method.config.pairs_per_walk) / batch.size
    asked = (len(method.times) * (1 + heun) - heun) * method.teacher.calls
    return {"student": Calls(to_parameters=1), "teacher": Calls(no_grad=walks * asked)}


def _free_flow(method: Any, step: int, batch: Batch) -> Cost:
    """What one step costs: of the corrected share the critic's two passes, of the others the derivative."""
    predicted, corrected = (part / batch.size for part in method.config.parts(batch.size))
    whole = predicted + corrected
    # The tangent of an exact derivative enters by the second time, behind the network's door, where none is counted.
    calls = {
        "student": Calls(no_grad=predicted, to_parameters=whole),
        "teacher": Calls(no_grad=whole * method.teacher.calls),
    }
    return calls | {"critic": Calls(no_grad=corrected, to_parameters=corrected)}


def _rectified_flow(method: Any, step: int, batch: Batch) -> Cost:
    """What one step costs: one pass of the student. Pairs are paid for once, before the training."""
    return {"student": Calls(to_parameters=1)}


def _walk_calls(method: Any) -> int:
    """How often the teacher is asked on its way through a window, unguided."""
    calls: int = method.config.solver_steps * {"euler": 1, "heun": 2}[method.config.solver]
    return calls


def _perflow(method: Any, step: int, batch: Batch) -> Cost:
    """What one step costs: the teacher's way through a window, and one pass of the student."""
    asked = _walk_calls(method) * method.teacher.calls
    return {"student": Calls(to_parameters=1), "teacher": Calls(no_grad=asked)}


def _continuous_consistency(method: Any, step: int, batch: Batch) -> Cost:
    """What one step costs; the student's own earlier steps count too, once it is matched."""
    config, w, matching = method.config, method.teacher.calls, method.matches(step)
    earlier = batch.draws.shared_integer("student_step", 0, len(method.sampler.grid)) if matching else 0
    if matching and step % (config.critic_updates + 1):
        return {"student": Calls(no_grad=earlier + 1), "critic": Calls(to_parameters=1)}
    if config.variant == "tcm":
        at = len(method.times.boundary(batch.draws.indices)) / batch.size
        return {"student": Calls(no_grad=1 - at, to_parameters=1), "target": Calls(no_grad=at)}
    asked = {"exact": 0, "central": 2, "renoise": 2}.get(config.derivative, 1)
    exact = int(config.derivative in ("exact", "semi_continuous"))
    calls = {"student": Calls(no_grad=asked + earlier, to_parameters=1 + matching, jvp=exact)}
    if matching:
        calls["critic"] = Calls(no_grad=1)
    asked_teacher = w * ((config.velocity == "teacher") + matching)
    return calls | ({"teacher": Calls(no_grad=asked_teacher)} if asked_teacher else {})


def _any_flow(method: Any, step: int, batch: Batch) -> Cost:
    """What one step costs: of the map what is not asked for where the two times agree, of rollouts what is drawn."""
    config, since = method.config, step - method.config.first_on_policy_step
    calls: dict[str, dict[str, float]] = {"student": dict.fromkeys(("no_grad", "to_parameters", "jvp"), 0.0)}
    calls["teacher"], student_turn = {"no_grad": 0.0}, since < 0 or since % config.critic_updates == 0
    if since < 0 or (student_turn and config.map_weight > 0):
        apart = len(method.points(batch).parts.apart) / batch.size
        calls["student"]["to_parameters"] += 1
        calls["student"]["no_grad"] += (method.fused != 1.0) + apart * (
            method.difference.calls if method.difference else 0
        )
        calls["student"]["jvp"] += 0 if method.difference else apart
        calls["teacher"]["no_grad"] += method.mapped.calls if config.velocity == "teacher" else 0
    if since >= 0:
        if student_turn:
            calls["student"]["to_parameters"] += len(method.shortcut_drawn(batch, "student")[1])
            calls["teacher"]["no_grad"] += method.teacher.calls
        calls["student"]["no_grad"] += len(method.shortcut_drawn(batch, "critic_rollout")[1])
        calls["critic"] = {"no_grad": float(student_turn), "to_parameters": 1.0}
    return {name: Calls(**counted) for name, counted in calls.items()}


_BY_CLASS = {
    "AnyFlow": _any_flow,
    "ContinuousConsistency": _continuous_consistency,
    "Dmd2": _dmd2,
    "PhasedDmd": _phased_dmd,
    "Sid": _sid,
    "Consistency": _consistency,
    "MeanFlow": _mean_flow,
    "PerFlow": _perflow,
    "MfRae": _mf_rae,
    "FreeFlow": _free_flow,
    "RectifiedFlow": _rectified_flow,
    "SegmentedConsistency": _segmented_consistency,
}
