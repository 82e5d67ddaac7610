"""The command line: ``fewstep demo | probe | distill | sample | eval``.

Exit codes: 0 done, 2 the user can mend it (one line on stderr says how), 130 interrupted after a checkpoint.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from fewstep import __version__
from fewstep.errors import UserError

USAGE = """fewstep: few-step distillation of diffusion and flow-matching pipelines

  fewstep demo                          distil an embedded teacher and compare both
  fewstep probe TEACHER                 show what is recorded of a pipeline, and prove it
  fewstep distill METHOD --teacher ...  train a student
  fewstep sample DIR --out FILE.png     sample from a student
  fewstep eval DIR [DIR ...] --out DIR  measure students beside their teacher

fewstep COMMAND --help lists the flags of a command; fewstep distill METHOD --help those of a method.
"""


class _Parser(ArgumentParser):
    """A parser whose errors are one line and exit code 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(" ".join(str(message).split()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code; tracebacks are for bugs."""
    from fewstep.loop import Interrupted

    words = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fewstep").setLevel(logging.INFO)
    try:
        if not words or words[0] in ("-h", "--help"):
            print(USAGE, end="")
            return 0
        if words[0] == "--version":
            print(__version__)
            return 0
        if words[0] not in COMMANDS:
            raise UserError(f"there is no command {words[0]!r}; there are: {', '.join(COMMANDS)}")
        COMMANDS[words[0]](words[1:])
    except UserError as error:
        print(f"fewstep: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        # With a number it is the system's own word about a file: no space, no permission. Others may be bugs.
        if error.errno is None:
            raise
        print(f"fewstep: {error}; mend that and start again, with --resume where a run was going on", file=sys.stderr)
        return 2
    except Interrupted:
        print("fewstep: interrupted; a checkpoint is written, --resume goes on from it", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("fewstep: interrupted", file=sys.stderr)
        return 130
    return 0


# --- distill ----------------------------------------------------------------------------------------------------


def distill_parser(method: str) -> ArgumentParser:
    """The flags of a method: the fields of its configuration, with ``--config`` and ``--print_config``."""
    from fewstep.distillation import method_class

    parser = _Parser(prog=f"fewstep distill {method}", description=f"Distil a teacher with {method}.")
    parser.add_argument("--config", action="config", help="YAML file with any of these flags; flags after it win")
    parser.add_class_arguments(method_class(method).Config)
    return parser


def distill_config(method: str, words: Sequence[str]) -> Any:
    """The configuration of a method that these command line words ask for."""
    from fewstep.distillation import method_class

    parsed = _parse(distill_parser(method), _with_values(words, method_class(method).Config))
    return method_class(method).Config(**{name: value for name, value in parsed.items() if name != "config"})


def _distill(words: list[str]) -> None:
    from fewstep.distillation import Distillation, methods

    if not words or words[0].startswith("-"):
        raise UserError(f"fewstep distill takes a method first: {', '.join(methods())}")
    method = words[0]
    config = distill_config(method, words[1:])
    student = Distillation(config, method).run()
    _announce(student)


def _announce(student: Path) -> None:
    from accelerate import PartialState

    if PartialState().is_main_process:
        if (student / "model_index.json").is_file():
            print(f"the student is in {student}; fewstep sample {student} --out sample.png")
        else:
            print(f"the student is in {student}; its README.md shows how to load it, --merge makes a whole pipeline")


# --- probe ------------------------------------------------------------------------------------------------------


def _probe(words: list[str]) -> None:
    from fewstep.recording import record
    from fewstep.teacher import load_teacher

    parser = _Parser(
        prog="fewstep probe", description="Show what is recorded of a pipeline; exit 0 only if it is proven."
    )
    parser.add_argument("teacher", type=str, help="folder, hub id, fashion-sd or fashion-flow")
    parser.add_argument("--call", type=dict[str, Any] | None, default=None, help="JSON for its call")
    parser.add_argument("--trust_remote_code", type=bool, default=False, help="let it run code from its own folder")
    parsed = _parse(parser, _with_values(words, {"trust_remote_code"}))
    recording = record(load_teacher(parsed.teacher, parsed.trust_remote_code), **(parsed.call or {}))
    recording.prove()
    print(recording.summary())


# --- sample -----------------------------------------------------------------------------------------------------


def _sample(words: list[str]) -> None:
    from fewstep.eval.sample import sample

    parser = _Parser(prog="fewstep sample", description="Sample from a student, with the call on its card.")
    parser.add_argument("directory", metavar="DIR", type=str, help="a student's folder (or a teacher's, with --steps)")
    parser.add_argument("--prompt", type=str | None, default=None)
    parser.add_argument("--class", dest="label", type=int | None, default=None, help="a class label")
    parser.add_argument("--steps", type=int | None, default=None, help="default: the student's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num", type=int, default=1, help="how many samples")
    parser.add_argument("--out", type=str, required=True, help="a PNG file")
    parsed = _parse(parser, words)
    path = sample(
        parsed.directory,
        prompt=parsed.prompt,
        label=parsed.label,
        steps=parsed.steps,
        seed=parsed.seed,
        num=parsed.num,
        out=parsed.out,
    )
    print(path)


# --- eval -------------------------------------------------------------------------------------------------------


def _eval(words: list[str]) -> None:
    from fewstep.data import read_classes, read_prompts
    from fewstep.eval.evaluate import evaluate

    parser = _Parser(
        prog="fewstep eval", description="Measure students beside their teacher: report.json, report.md, grid.png."
    )
    parser.add_argument("students", metavar="DIR", nargs="+", type=str, help="student folders")
    parser.add_argument("--teacher", type=str | None, default=None, help="folder, hub id, fashion-sd or fashion-flow")
    parser.add_argument("--teacher_steps", type=str, default="1,4,25", help="comma separated")
    parser.add_argument(
        "--teacher_call", type=dict[str, Any] | None, default=None, help="JSON of arguments for its call"
    )
    parser.add_argument("--steps", type=str, default="1,2,4", help="the students' step counts, comma separated")
    parser.add_argument("--num", type=int, default=5000, help="samples in every row")
    parser.add_argument("--prompts", type=str | None, default=None, help="UTF-8 file, one a line")
    parser.add_argument("--classes", type=str | None, default=None, help="labels such as 0-9")
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=str, required=True, help="folder for the report")
    parsed = _parse(parser, words)
    report = evaluate(
        parsed.students,
        teacher=parsed.teacher,
        teacher_steps=_counts("--teacher_steps", parsed.teacher_steps),
        teacher_call=parsed.teacher_call,
        steps=_counts("--steps", parsed.steps),
        num=parsed.num,
        prompts=read_prompts(parsed.prompts) if parsed.prompts else None,
        classes=read_classes(parsed.classes) if parsed.classes else None,
        batch_size=parsed.batch_size,
        seed=parsed.seed,
        out=Path(parsed.out),
    )
    print(report.table())


def _counts(flag: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"{flag} takes step counts such as 1,2,4, not {text!r}") from error


# --- demo -------------------------------------------------------------------------------------------------------


def _demo(words: list[str]) -> None:
    from fewstep.eval.demo import demo

    parser = _Parser(prog="fewstep demo", description="Distil an embedded teacher with DMD2 and compare both.")
    parser.add_argument("--teacher", type=str, default="fashion-sd", help="fashion-sd or fashion-flow")
    parser.add_argument("--steps", type=int, default=4, help="the student's step count")
    parser.add_argument("--out", type=str | None, default=None, help="default: runs/demo-TEACHER")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_steps", type=int | None, default=None, help="default: the shipped recipe's")
    parser.add_argument("--num", type=int | None, default=None, help="samples in every row of the report")
    parsed = _parse(parser, words)
    if parsed.num is not None and parsed.num < 1:  # said now, and not after the training
        raise UserError(f"--num must be at least 1, not {parsed.num}")
    out = Path(parsed.out or f"runs/demo-{parsed.teacher}")
    report = demo(parsed.teacher, out, steps=parsed.steps, seed=parsed.seed, max_steps=parsed.max_steps, num=parsed.num)
    print(report.table())
    print(
        f"pictures: {out / 'report' / 'grid.png'}, report: {out / 'report' / 'report.md'}, student: {out / 'student'}"
    )


# --- parsing ----------------------------------------------------------------------------------------------------


def _parse(parser: ArgumentParser, words: Sequence[str]) -> Namespace:
    try:
        return parser.parse_args(list(words))
    except UnicodeDecodeError as error:
        raise UserError("the file of --config is not UTF-8 text") from error


def _with_values(words: Sequence[str], switches: type | set[str]) -> list[str]:
    """Give a bare ``--resume`` its value: switches may stand alone, as everywhere in the Hugging Face world."""
    if isinstance(switches, type):
        switches = {field.name for field in dataclasses.fields(switches) if field.type in ("bool", bool)}
    full: list[str] = []
    for word, following in zip(words, [*words[1:], "--"]):
        full.append(word)
        if word.startswith("--") and word[2:] in switches and following.startswith("-"):
            full.append("true")
    return full


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": _demo,
    "probe": _probe,
    "distill": _distill,
    "sample": _sample,
    "eval": _eval,
}


if __name__ == "__main__":
    sys.exit(main())
