"""What a step of each method may cost: network calls by role and per sample of the batch, worked out by hand.

The method's own steps are counted where they run, and compared with this; each guided pair counts as two. Passes that
end early at a GAN head's tap are listed as ``<role>/features``.
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
        calls["student"] = Calls(no_grad=2 * earlier + 1, to_parameters=1)
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


def _mean_flow(method: Any, step: int, batch: Batch) -> Cost:
    """What one step costs: what is only asked for where the two times differ is not asked for elsewhere."""
    config, alpha = method.config, method.config.alpha(step)
    apart = sum(batch.draws.coins("apart", config.apart)) / batch.size
    own = 0 if method.guide is None else 1 + (method.guide.kappa > 0)
    own += apart * ((0 < alpha < 1) + (config.variant == "improved"))
    derived = apart * (alpha == 0)
    if method.one_pass:
        calls = {"student": Calls(no_grad=own, to_parameters=1 - derived, jvp_to_parameters=derived)}
    else:
        calls = {"student": Calls(no_grad=own, to_parameters=1, jvp=derived)}
    return calls | ({"teacher": Calls(no_grad=method.teacher.calls)} if config.velocity == "teacher" else {})


def _rectified_flow(method: Any, step: int, batch: Batch) -> Cost:
    """What one step costs: one pass of the student. Pairs are paid for once, before the training."""
    return {"student": Calls(to_parameters=1)}


_BY_CLASS = {
    "Dmd2": _dmd2,
    "PhasedDmd": _phased_dmd,
    "Sid": _sid,
    "Consistency": _consistency,
    "MeanFlow": _mean_flow,
    "RectifiedFlow": _rectified_flow,
}
