"""``fewstep plan TEACHER``."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence

from diffusers.utils.logging import set_verbosity_error

from fewstep.config.parsing import Parser, parse, with_values
from fewstep.config.run import RunConfig
from fewstep.config.values import bytes_in_words
from fewstep.errors import UserError
from fewstep.programs.auto import CHOOSE, decide
from fewstep.programs.methods import method_class, methods
from fewstep.programs.planning.call_counts import Calls, forward_passes
from fewstep.programs.planning.counting import PERIOD
from fewstep.programs.planning.evaluations import Evaluations
from fewstep.programs.planning.plan import LEFT_OUT, Plan, Planner

_MOST = 10**12  # of any unit
_UNITS = {"": 10**9, "GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20}


def run(words: Sequence[str]) -> None:
    """Print what a run would take, and whether it fits."""
    if words and words[0].startswith("-") and not {"-h", "--help"} & set(words):
        raise UserError("the teacher comes first, then the method: fewstep plan TEACHER METHOD --memory 24GB")
    method = words[1] if len(words) > 1 and not words[1].startswith("-") else "dmd2"
    config_class = RunConfig if method == CHOOSE else method_class(method).Config
    parser = Parser(
        prog="fewstep plan",
        description="What a run would take: parameters, memory, network calls. No weights are loaded or fetched.",
    )
    parser.add_argument("teacher", type=str, help="folder (configuration files are enough), hub id, or embedded name")
    parser.add_argument(
        "method", nargs="?", type=str, default="dmd2", help=f"one of: {', '.join((CHOOSE, *methods()))}"
    )
    parser.add_argument("--memory", type=str | None, default=None, help="what there is, such as 24GB")
    parser.add_argument("--config", action="config", help="YAML file with any of these flags; flags after it win")
    parser.add_class_arguments(config_class, skip={"teacher", "out"})
    parsed = parse(parser, with_values(words, config_class), defaults=method != CHOOSE)
    settings = {name: value for name, value in parsed.items() if name not in ("method", "memory", "config")}
    # What diffusers says of networks is not about these, and what fake tensors refuse is told in one line.
    set_verbosity_error()
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    memory = None if parsed.get("memory") is None else memory_bytes(parsed.memory)
    if method == CHOOSE:
        decision = decide(settings)
        decision.say()
        planner = Planner(decision.config, decision.method)
    else:
        planner = Planner(config_class(out="", **settings), method)
    plan = planner.plan()
    print(describe(plan))
    if memory is not None:
        print(_row("fits", _verdict(planner, plan, memory)))


def memory_bytes(text: str) -> int:
    """``24GB``, ``80GiB``, ``500MB`` or a plain number of GB, in bytes.

    Raises:
        UserError: it is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS or not 0 < float(match[1]) < _MOST:
        raise UserError(f"--memory takes a size such as 24GB or 80GiB, not {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def describe(plan: Plan) -> str:
    """A plan as a table for people; every number says how it came about."""
    roles = plan.roles
    weights = {"pipeline": plan.kept} | {name: role.weights for name, role in roles.items()}
    graphs = {f"{name}'s turn": moment.graph for name, moment in plan.moments.items()}
    moments = {f"{name}'s turn": moment.peak for name, moment in plan.moments.items()}
    rows = [
        ("teacher", f"{plan.teacher}: {plan.pipeline}, {plan.component}, {list(plan.sample_shape)} per sample"),
        ("run", f"{plan.method}, {plan.settings}"),
        ("attention", plan.attention),
        ("parameters", "computed: " + ", ".join(f"{k} {_count(v)}" for k, v in plan.parameters.items())),
        ("recording", f"computed: {bytes_in_words(plan.recording)}, the whole pipeline as loaded, with its encoders"),
        *_encoding(plan),
        ("weights", f"computed: {_sizes(weights)}"),
        ("gradients", f"computed: {_sizes({name: role.gradients for name, role in roles.items()})}, one at a time"),
        ("optimizer", f"computed: {_sizes({name: role.optimizer for name, role in roles.items()})}"),
        ("activations", f"estimated: {_sizes(graphs)}, kept for the backward pass"),
        ("", f"estimated: {_sizes(moments)}, at most, with gradients and working memory"),
        ("peak", f"estimated: {bytes_in_words(plan.peak)}: {_largest(plan)}"),
        ("network calls", f"computed: a step and sample, mean of the last {PERIOD} steps: {_calls(plan.calls)}"),
        ("", f"{forward_passes(plan.calls):.2f} forward passes, if a tapped pass cost as much as a whole one"),
        *_evaluations(plan.evaluations),
        ("not counted", LEFT_OUT),
        ("assumed", "the call was recorded from networks without weights: shapes are seen, nothing is proven"),
    ]
    if plan.device == "cpu" and "bf16" in plan.settings:
        rows.append(("", "bfloat16 as on a CPU; a GPU's autocast keeps norms in float32, which takes a little more"))
    return "\n".join(_row(name, text) for name, text in rows)


def _encoding(plan: Plan) -> list[tuple[str, str]]:
    """What is over before the training, and what an item takes from then on."""
    rows = []
    if plan.encoding:
        rows.append(("encoders", f"estimated: {_sizes(plan.encoding)}, beside that and before the training"))
    if plan.item is not None:
        rows.append(("item", f"computed: {bytes_in_words(plan.item)} for each, encoded and cached"))
    if plan.items:
        rows.append(("", f"computed: {plan.items}"))
    rows += [("", note) for note in plan.notes]
    return rows


def _evaluations(evaluations: Evaluations | None) -> list[tuple[str, str]]:
    if evaluations is None:
        return []
    teacher = f", teacher {evaluations.teacher:,} before them" if evaluations.teacher else ""
    what = f"{evaluations.count} of {evaluations.samples:,} samples: student {evaluations.student:,} calls{teacher}"
    return [
        ("evaluations", f"computed: {what}; {evaluations.share:.1%} of the forward passes of all steps on one process")
    ]


def _verdict(planner: Planner, plan: Plan, memory: int) -> str:
    there, apart = bytes_in_words(memory), bytes_in_words(abs(memory - plan.peak))
    if plan.peak <= memory:
        return f"yes: {apart} of {there} to spare"
    return f"no: {apart} more than {there}; {planner.advice(plan, memory)}"


def _row(name: str, text: str) -> str:
    return f"{name:<15}{text}"


def _largest(plan: Plan) -> str:
    before = plan.encoders_peak >= plan.peak
    return "the whole pipeline while it encodes" if before else "weights, optimizer and the larger turn"


def _sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {bytes_in_words(number)}" for name, number in sizes.items() if number) or "none"


def _count(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e6 else f"{number / 1e3:,.1f} K"


def _calls(calls: Mapping[str, Calls]) -> str:
    kinds = {
        "no_grad": "without gradient",
        "to_parameters": "trained",
        "to_inputs": "with the gradient of its input",
        "jvp": "with a tangent",
        "jvp_to_parameters": "trained, with a tangent",
    }
    parts = []
    for name, one in calls.items():
        counts = [f"{count:.2f} {kinds[kind]}" for kind, count in vars(one).items() if count]
        parts += [f"{name} {' + '.join(counts)}"] if counts else []
    return ", ".join(parts)
