"""What a step of each method may cost: network calls by role and per sample of the batch, worked out by hand.

The method's own steps are counted where they run, and compared with this; each guided pair counts as two. Passes that
end early at a GAN head's tap are listed as ``<role>/features``. Tests and ``fewstep bench --part calls`` read it.
"""

from __future__ import annotations

import math
from typing import Any

from fewstep.data.batch import Batch
from fewstep.eval.bench.formulas import walk_calls
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


def _dmd2(method: Any, step: int, batch: Batch) -> Cost:
    """What one step costs; the student's own earlier steps count too."""
    config, earlier = method.config, batch.draws.shared_integer("student_step", 0, len(method.sampler.grid))
    guided = method.teacher.calls if method.drawn_guidance(batch) is None else 2
    student_turn = step % config.critic_updates == 0
    calls = {"student": Calls(no_grad=earlier + 1), "critic": Calls(to_parameters=1)}
    if student_turn:
        asked = {"none": guided}.get(config.decoupled, 3 + (config.decoupled_normalizer == "guided"))
        followed = guided if config.swiftbrush else 1
        calls = {"student": Calls(no_grad=earlier, to_parameters=1), "teacher": Calls(no_grad=asked)}
        calls["critic"] = Calls(no_grad=followed, to_parameters=1)
    if method.tap is not None:
        weighs, pulls = student_turn and config.f_divergence != "none", student_turn and config.gan_weight > 0
        own = method.judge is not method.critic  # only the head learns then
        seen = {"no_grad": int(weighs) + 2 * own, "to_parameters": 2 * (not own), "to_inputs": int(pulls)}
        calls[f"{method.judge.name}/features"] = Calls(**seen)
    return calls


def _multi_student(method: Any, step: int, batch: Batch) -> Cost:
    """What one step of one student costs: in the pre-training it and the teacher are asked once, then DMD2's."""
    before = method.config.steps_before
    if step < before:
        return {"student": Calls(to_parameters=1), "teacher": Calls(no_grad=1)}
    return _dmd2(method.own, step - before, batch)


def _disback(method: Any, step: int, batch: Batch) -> Cost:
    """What one step costs: DMD2's with the node in the teacher's place, or the critic's turn alone."""
    number, start = method.place(step), method.config.degradation
    if number < 0:
        earlier = batch.draws.shared_integer("student_step", 0, len(method.sampler.grid))
        return {"student": Calls(no_grad=earlier + 1), "critic": Calls(to_parameters=1)}
    cost = _dmd2(method.matchers[number], step - start, batch)
    if "teacher" in cost:
        cost[method.matchers[number].teacher.denoiser.name] = cost.pop("teacher")
    return cost


def _flash_dmd(method: Any, step: int, batch: Batch) -> Cost:
    """What one step costs: a student's turn finishes its walk, and calls at a clean step once more for the judge."""
    earlier, steps = batch.draws.shared_integer("student_step", 0, method.matched), len(method.sampler.grid)
    if method.config.prefers(step):
        student = Calls(no_grad=earlier + method.config.preference_candidates, to_parameters=1)
        return {"student": student, "target": Calls(no_grad=1)}
    if not method.config.student_moves(step):
        return {"student": Calls(no_grad=earlier + 1), "critic": Calls(to_parameters=1)}
    judged = method.judge is not None
    student = Calls(no_grad=steps - 1 if judged else earlier, to_parameters=1 + judged)
    critic = Calls(no_grad=1, to_parameters=1)
    return {"student": student, "teacher": Calls(no_grad=method.teacher.calls), "critic": critic}


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


def _hyper_sd(method: Any, step: int, batch: Batch) -> Cost:
    """What one step costs: that of the trajectories, and of a one-step sample what its stage asks for."""
    config, (stage, first) = method.config, method.config.stage_at(step)
    moves = stage != "score" or (step - first) % config.critic_updates == 0
    calls: Cost = {}
    if moves and (stage == "tscd" or config.trajectory_weight > 0):
        calls = _segmented_consistency(method.trajectories, step, batch)
    if stage != "tscd":
        _add(calls, "student", Calls(no_grad=not moves, to_parameters=int(moves)))
    if stage == "score":
        _add(calls, "critic", Calls(no_grad=int(moves), to_parameters=1))
        _add(calls, "teacher", Calls(no_grad=method.teacher.calls * moves))
    return calls


def _add(calls: Cost, name: str, more: Calls) -> None:
    """Add to what a role costs."""
    had = calls.get(name, Calls())
    calls[name] = Calls(had.no_grad + more.no_grad, had.to_parameters + more.to_parameters)


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
        return _mean_flow(method.flow(stage, math.prod(batch.shape)), step, batch)
    heun = method.config.walk_solver == "heun"
    walks = -(-batch.size // method.config.pairs_per_walk) / batch.size
    asked = (len(method.times) * (1 + heun) - heun) * method.teacher.calls
    return {"student": Calls(to_parameters=1), "teacher": Calls(no_grad=walks * asked)}


def _mdt_dist(method: Any, step: int, batch: Batch) -> Cost:
    """What one step costs: velocity matching, and the same without a gradient at a sample of one step."""
    terms = 1 + (method.config.distillation_weight > 0)
    distilled = terms - 1
    teacher = Calls(no_grad=method.teacher.calls + distilled * method.distilled.calls)
    if method.difference is not None:
        asked = terms * method.difference.calls + distilled
        return {"student": Calls(no_grad=asked, to_parameters=terms), "teacher": teacher}
    if method.one_pass:
        return {"student": Calls(to_parameters=distilled, jvp_to_parameters=1, jvp=distilled), "teacher": teacher}
    return {"student": Calls(to_parameters=terms, jvp=terms), "teacher": teacher}


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


def _perflow(method: Any, step: int, batch: Batch) -> Cost:
    """What one step costs: the teacher's way through a window, and one pass of the student."""
    asked = walk_calls(method) * method.teacher.calls
    return {"student": Calls(to_parameters=1), "teacher": Calls(no_grad=asked)}


def _speed_up_net(method: Any, step: int, batch: Batch) -> Cost:
    """What one step costs: the guided teacher's way through a step of the student, and one pass of the student."""
    return {"student": Calls(to_parameters=1), "teacher": Calls(no_grad=2 * method.config.asked_calls)}


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
        apart = len(method.parts(batch).apart) / batch.size
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


def _twin_flow(method: Any, step: int, batch: Batch) -> Cost:
    """What one step costs: one pass for all parts; fakes, targets, guidance and matching for the rows that use them."""
    config, times = method.config, method.parts.draw(batch.draws, batch.per_step or batch.size)
    base = [row for row, part in enumerate(times.part) if part != "adv"]
    drops = method.ratio and config.reference == "student" and config.label_drop
    dropped = batch.draws.coins("label_drop", config.label_drop) if drops else [False] * batch.size
    inside = [row for row in base if config.guidance_t_min < times.t[row] < config.guidance_t_max]
    followed = config.velocity == "teacher"
    asked = len(inside) * method.guide.calls if followed else 2 * sum(not dropped[row] for row in inside)
    asked = asked if followed or method.ratio else 0
    walked = config.order * sum(method.is_far(times, row) for row in base) if method.recursive else 0
    made = batch.size if config.image_free else len(times.rows("adv"))
    own = {"student": made + 2 * len(times.rows("e2e")) * config.matches, "target": 0, "teacher": 0}
    follower = "target" if config.target_decay else "student"
    own[follower] += walked
    own["teacher" if config.reference == "frozen" else follower] += asked
    calls = {name: Calls(no_grad=count / batch.size) for name, count in own.items()}
    return calls | {"student": Calls(no_grad=own["student"] / batch.size, to_parameters=1)}


_BY_CLASS = {
    "AnyFlow": _any_flow,
    "ContinuousConsistency": _continuous_consistency,
    "Dmd2": _dmd2,
    "MultiStudent": _multi_student,
    "Disback": _disback,
    "FlashDmd": _flash_dmd,
    "PhasedDmd": _phased_dmd,
    "Sid": _sid,
    "HyperSd": _hyper_sd,
    "Snoopi": _dmd2,
    "Consistency": _consistency,
    "MeanFlow": _mean_flow,
    "PerFlow": _perflow,
    "SpeedUpNet": _speed_up_net,
    "MdtDist": _mdt_dist,
    "MfRae": _mf_rae,
    "FreeFlow": _free_flow,
    "RectifiedFlow": _rectified_flow,
    "SegmentedConsistency": _segmented_consistency,
    "TwinFlow": _twin_flow,
}
