"""Weights that a run starts with when they are not the teacher's: those of another run, or of a pipeline folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fewstep.diffusion.schedule import from_scheduler
from fewstep.errors import UserError
from fewstep.networks.adapters import AdapterRole
from fewstep.networks.flow_map import SECOND_TIME
from fewstep.networks.roles import NODE, Role, follow
from fewstep.networks.speed_up import SPEED_UP
from fewstep.networks.two_time_form import from_two_time_form, is_two_time_form
from fewstep.reading import read_json, read_yaml
from fewstep.recording import Recording
from fewstep.recording.pipeline import find_scheduler
from fewstep.teachers.loading import load_teacher
from fewstep.training import checkpoint

_FORMS = {"network": "a network", "adapter": "an adapter", SPEED_UP: "an adapter of speed_up_net"}


def initialize(
    roles: dict[str, Role],
    init: str,
    recording: Recording,
    say: Callable[[str], None],
    trust_remote_code: bool = False,
) -> None:
    """Load ``init`` into the roles; the averages, where there are any, start at the student.

    Args:
        roles: of the new run; the student, and of a run's folder the critics with their heads, are overwritten.
        init: another run's folder (its newest checkpoint), or a pipeline (its network becomes the student's).
        recording: of the teacher.
        say: told in one line what does not come from ``init``.
        trust_remote_code: let a pipeline run code from its own folder.

    Raises:
        UserError: there is no such thing, or its weights are not those of a student of this teacher.
    """
    source = Path(init)
    if (source / "checkpoints").is_dir():
        _refuse_other_prediction(init, _prediction_of_run(source), recording)
        found = checkpoint.find_latest(source / "checkpoints")
        say(found.note)
        tensors = found.tensors()
        _refuse_other_path(init, roles, tensors)
        for name in (name for name in roles if name == "student" or name.startswith("critic")):
            if name in tensors:
                _refuse_other_form(init, source, roles[name], tensors[name])
                _load_run(roles[name], tensors[name], say)
            elif not roles[name].kept:
                say(f"--init has no {name}; it starts as the teacher")
    else:
        _refuse_other_path(init, roles, {})
        pipeline = load_teacher(init, trust_remote_code, flag="--init")
        networks: dict[str, nn.Module] = {}
        for name in recording.components:
            network = getattr(pipeline, name, None)
            if network is None:
                raise UserError(f"--init {init} has no {name}; it is of another family than the teacher")
            networks[name] = network
        _refuse_other_prediction(init, _prediction_of_pipeline(pipeline), recording)
        student = roles["student"]
        if student.is_adapter:
            raise UserError(
                f"--init {init} is a whole network, and with --lora_rank the student is an adapter of the teacher; "
                "leave one of the two out"
            )
        whole = nn.ModuleDict(networks) if len(networks) > 1 else networks[recording.component]
        if SPEED_UP in student.added and getattr(pipeline, SPEED_UP, None) is None:
            raise UserError(
                f"--init {init} has no adapter of speed_up_net, which is all that is trained here; give a run or a "
                "student of speed_up_net, or a fine-tuned network as --teacher"
            )
        _refuse_lost_time(init, student, is_two_time_form(whole) or getattr(pipeline, SECOND_TIME, None) is not None)
        state, told = dict(whole.state_dict()), dict[str, Tensor]()
        if is_two_time_form(whole):
            state, told = from_two_time_form(whole)
        weights = {f"network.{k}": v for k, v in state.items()}
        weights |= {f"{SECOND_TIME}.{k}": v for k, v in told.items()}
        for part in student.added:  # a student of two times brings its second one along
            own = getattr(pipeline, part, None)
            weights |= {f"{part}.{k}": v for k, v in own.state_dict().items()} if own is not None else {}
        _refuse_other_weights(init, student, _form(student.state_dict())[0], weights)
        _load_run(student, weights, say)
        critics = "; the critic starts from the teacher" if any(name.startswith("critic") for name in roles) else ""
        say(f"the student starts from {init}{critics}")
    follow(roles)


def _load_run(role: Role, tensors: dict[str, Tensor], say: Callable[[str], None]) -> None:
    """Load a role of another run; added modules that the other run did not have keep their fresh weights."""
    mine = role.state_dict()
    for part in role.added:
        fresh = {name: value for name, value in mine.items() if name.startswith(f"{part}.")}
        if fresh and not any(name.startswith(f"{part}.") for name in tensors):
            tensors = {**tensors, **fresh}
            say(f"--init has no {part} of the {role.name}; it starts afresh")
    role.load_state_dict(tensors)


def _refuse_other_path(init: str, roles: dict[str, Role], tensors: dict[str, dict[str, Tensor]]) -> None:
    """A path that is not the one that was recorded leads elsewhere; without one the run would not notice."""
    if wanted := [name for name, role in roles.items() if role.wanted_of_init]:
        there = sum(name.startswith(NODE) for name in tensors)
        if there != len(wanted) or not tensors.keys() >= set(wanted):
            raise UserError(
                f"--init {init} has a path of {there} nodes and this run asks for {len(wanted)}; give a run that "
                "recorded as many, and its --record_steps"
            )


def _refuse_other_form(init: str, source: Path, role: Role, tensors: dict[str, Tensor]) -> None:
    """An adapter is no network, two networks are not one, and one that was trained under another alpha is another."""
    (part, wanted), (other, has) = _form(role.state_dict()), _form(tensors)
    if part != other:
        same = "method" if SPEED_UP in (part, other) else "--lora_rank and --full_critic"
        raise UserError(
            f"--init {init} holds {has} for the {role.name} where this run has {wanted}; give both runs the same {same}"
        )
    _refuse_other_weights(init, role, part, tensors)
    _refuse_lost_time(init, role, SECOND_TIME in {name.partition(".")[0] for name in tensors})
    own = next(iter(role.experts.values()))
    if isinstance(own, AdapterRole) and (theirs := _alpha_of_run(source)) not in (None, own.backbone.alpha):
        raise UserError(f"--init {init} was trained with --lora_alpha {theirs:g}; give this run the same")


def _refuse_other_weights(init: str, role: Role, part: str, tensors: dict[str, Tensor]) -> None:
    """Of the ``part`` of its state that a role is made of, names and shapes have to agree."""
    own, other = (
        {name: value.shape for name, value in state.items() if name.startswith(f"{part}.")}
        for state in (role.state_dict(), tensors)
    )
    strange = sorted(own.keys() ^ other.keys()) or [name for name, shape in own.items() if shape != other[name]]
    if strange:
        more = f" and {len(strange) - 1} more" if strange[1:] else ""
        raise UserError(
            f"--init {init} has other weights for the {role.name} than this run trains ({strange[0]}{more}); start "
            "from a run on this teacher with as many networks, the same --lora_rank and the same embeddings"
        )


def _refuse_lost_time(init: str, role: Role, has_second: bool) -> None:
    """Without the module that tells it the second time, such a network says what it was never trained to say."""
    if has_second and SECOND_TIME not in role.added:
        raise UserError(
            f"--init {init} was trained to be told a second time, and this method's {role.name} is told one; "
            "start from a student of one time, or take a method of two (mean_flow, any_flow, mf_rae, ...)"
        )


def _form(tensors: dict[str, Tensor]) -> tuple[str, str]:
    """Which part of a role's state is what it is of, and what that is."""
    parts = {name.partition(".")[0] for name in tensors}
    return next((form for form in _FORMS.items() if form[0] in parts), ("", "nothing"))


def _refuse_other_prediction(init: str, theirs: str | None, recording: Recording) -> None:
    """Weights of one shape may mean different things: Stable Diffusion 2 exists with epsilon and with velocity."""
    if theirs is not None and theirs != recording.prediction_type:
        raise UserError(
            f"--init {init} predicts {theirs!r} and the teacher {recording.prediction_type!r}; "
            "start from a student of this teacher"
        )


def _prediction_of_run(source: Path) -> str | None:
    """What the exported student of a run says; None where it was not exported yet."""
    for form in ("student", "student_lora"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return str(read_json(source / form / "fewstep.json")["prediction_type"])
    return None


def _alpha_of_run(source: Path) -> float | None:
    """The alpha of a run's adapters; None where its configuration does not say."""
    try:
        settings = read_yaml(source / "config.yaml")
        return float(settings["lora_alpha"] or settings["lora_rank"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _prediction_of_pipeline(pipeline: Any) -> str | None:
    try:
        return from_scheduler(getattr(pipeline, find_scheduler(pipeline)))[1]
    except ValueError:  # no schedule that can be read off: the shapes of the weights have to do
        return None
