"""``fewstep pairs``."""

from __future__ import annotations

from collections.abc import Sequence

from fewstep.config.pairs import PairsConfig
from fewstep.config.parsing import Parser, parse, with_values
from fewstep.programs.pairs import make_pairs
from fewstep.training.distributed import leave_launch


def run(words: Sequence[str]) -> None:
    """Make noise-sample pairs of a teacher, for ``fewstep distill rectified_flow --pairs``."""
    from accelerate import PartialState

    parser = Parser(prog="fewstep pairs", description="Make noise-sample pairs of a teacher's ODE.")
    parser.add_class_arguments(PairsConfig)
    settings = parse(parser, with_values(words, PairsConfig)).as_dict()
    folder = make_pairs(settings.pop("teacher"), **settings)
    if PartialState().is_main_process:
        print(f"the pairs are in {folder}; fewstep distill rectified_flow --pairs {folder} trains on them")
    leave_launch()
