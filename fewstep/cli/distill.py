"""``fewstep distill METHOD``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from fewstep.cli import main as command_line
from fewstep.config.parsing import Parser, parse, with_values
from fewstep.config.run import RunConfig
from fewstep.data.cache_form import read_index
from fewstep.errors import UserError
from fewstep.eval.during import evaluator_of
from fewstep.export.about import read_about
from fewstep.programs import distillation
from fewstep.programs.auto import CHOOSE, decide, refuse_foreign
from fewstep.programs.methods import in_one_line, method_class, methods
from fewstep.training.distributed import leave_launch


def distill_parser(method: str) -> ArgumentParser:
    """The flags of a method: the fields of its configuration, with ``--config`` and ``--print_config``."""
    parser = Parser(prog=f"fewstep distill {method}", description=f"Distil a teacher with {method}.")
    parser.add_argument("--config", action="config", help="YAML file with any of these flags; flags after it win")
    # A run's own config.yaml names its method.
    parser.add_argument("--method", type=str, default=method, help=argparse.SUPPRESS)
    parser.add_class_arguments(method_class(method).Config)
    return parser


def distill_config(method: str, words: Sequence[str]) -> Any:
    """The configuration of a method that these command line words ask for."""
    config_class = method_class(method).Config
    parsed = parse(distill_parser(method), with_values(words, config_class))
    if parsed.method != method:
        raise UserError(f"the file of --config is of a run of {parsed.method}: start fewstep distill {parsed.method}")
    return config_class(**{name: value for name, value in parsed.items() if name not in ("config", "method")})


def auto_settings(words: Sequence[str]) -> dict[str, Any]:
    """The settings that these words of ``fewstep distill auto`` ask for; what they leave out is not among them."""
    parser = Parser(prog=f"fewstep distill {CHOOSE}", description="Distil a teacher with the best measured method.")
    parser.add_argument("--config", action="config", help="YAML file with any of these flags; flags after it win")
    parser.add_argument("--method", type=str, default=CHOOSE, help=argparse.SUPPRESS)
    parser.add_class_arguments(RunConfig)
    try:
        asked = parse(parser, with_values(words, RunConfig), defaults=False)
    except UserError:
        refuse_foreign(word[2:].partition("=")[0] for word in words if word.startswith("--"))
        raise
    if asked.get("method", CHOOSE) != CHOOSE:
        raise UserError(f"the file of --config is of a run of {asked.method}: start fewstep distill {asked.method}")
    return {name: value for name, value in asked.items() if name not in ("config", "method")}


def run(words: Sequence[str]) -> None:
    """Train and export a student."""
    if words and words[0] in ("-h", "--help"):
        print(_usage())
        return
    if not words or words[0].startswith("-"):
        raise UserError(f"fewstep distill takes a method first: {', '.join((CHOOSE, *methods()))}")
    method = words[0]
    if method == CHOOSE:
        decision = decide(auto_settings(words[1:]))
        decision.say()
        method, config = decision.method, decision.config
    else:
        config = distill_config(method, words[1:])
    _announce(distillation.run(config, method, evaluator=evaluator_of), config.items or _items_of(config.cache))
    leave_launch()


def _usage() -> str:
    """What is said where help is asked for and no method is named yet."""
    lines = {CHOOSE: "The best measured one for the teacher and --steps; takes the flags that all methods share."}
    lines |= {name: in_one_line(name) for name in methods()}
    width = max(map(len, lines))
    return "\n".join(
        (
            "fewstep distill METHOD --teacher TEACHER --steps N --out DIR: train a few-step student of a teacher",
            "",
            *(f"  {name:{width}}  {line}" for name, line in lines.items()),
            "",
            "fewstep distill METHOD --help lists the flags of a method.",
        )
    )


def _announce(student: Path, items: str | None) -> None:
    from accelerate import PartialState

    if PartialState().is_main_process:
        if (student / "model_index.json").is_file():
            asked = _asked_with(read_about(student), items)
            command = shlex.join(["fewstep", "sample", str(student), *asked, "--out", "sample.png"])
            print(f"the student is in {student}; {command}")
        else:
            print(f"the student is in {student}; its README.md shows how to load it, --merge makes a whole pipeline")


def _items_of(cache: str | None) -> str | None:
    """Where the items are that a cache was made of; None where it does not know, or holds prompts."""
    index = None if cache is None else read_index(Path(cache))
    return None if index is None else index.get("source")


def _asked_with(about: Mapping[str, Any], items: str | None) -> list[str]:
    """The words by which ``fewstep sample`` is told what a student shall make."""
    kind, example = about["conditional"], about.get("example")
    if kind == "item":
        return ["--items", items or "FILE"]
    if kind == "prompt":
        return ["--prompt", example if isinstance(example, str) else "a photo of a cat"]
    return [] if kind is None else ["--class", str(example if isinstance(example, int) else 0)]


def main(method: str) -> None:
    """``python -m fewstep.trainers.METHOD``, also under ``accelerate launch -m``: the flags of ``fewstep distill``."""
    sys.exit(command_line(["distill", method, *sys.argv[1:]]))
