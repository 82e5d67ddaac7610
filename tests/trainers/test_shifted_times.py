"""What teacher and critic are compared at, and a critic learns at, is shifted as the student's grid or as is asked."""

from collections.abc import Iterator
from typing import Any

import pytest
from tiny_pipelines import tiny_flow

from fewstep.config.run import RunConfig
from fewstep.diffusion.renoising import Renoiser
from fewstep.programs.methods import method_class, methods
from fewstep.programs.teacher import Teacher
from fewstep.programs.workbench import Workbench, open_workbench
from fewstep.recording.watch.shake import shaken

BASE = {"teacher": "tiny", "out": "unused", "batch_size": 2, "cpu": True, "report_to": "none", "lora_rank": 2}
#: What a method must be told to run on two prompts without images, and to have a critic.
NEEDED: dict[str, dict[str, Any]] = {
    "continuous_consistency": {"variant": "rcm", "derivative": "central"},
    "flash_dmd": {"gan_weight": 0.0},
    "multi_student": {"students": 2},
}
#: The GAN head of DMD2 sees samples at all times alike.
UNSHIFTED = ("judged",)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Teacher, str]:
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    pipeline = tiny_flow(3.0)
    with shaken(pipeline.transformer):
        call = {"max_sequence_length": 8}
        bench = open_workbench(RunConfig(**BASE, prompts=str(prompts), call=call), "cpu", pipeline)
    return bench.teacher, str(prompts)


def renoisers(thing: Any) -> Iterator[Renoiser]:
    """Those of a method and of what it is made of."""
    if isinstance(thing, Renoiser):
        yield thing
    elif isinstance(thing, (list, tuple)):
        for part in thing:
            yield from renoisers(part)
    elif type(thing).__module__.startswith(("fewstep.trainers", "fewstep.critic")):
        for name, part in vars(thing).items():
            if name not in UNSHIFTED:
                yield from renoisers(part)


@pytest.mark.parametrize("name", [name for name in methods() if hasattr(method_class(name).Config, "shift_of_times")])
def test_a_methods_times_are_shifted_as_its_grid_or_as_is_asked(name: str, opened: tuple[Teacher, str]) -> None:
    teacher, prompts = opened
    asked, expected = ({"time_shift": 5.0}, 5.0) if name == "flash_dmd" else ({}, 3.0)
    settings = BASE | NEEDED.get(name, {}) | asked | {"call": {"max_sequence_length": 8}}
    config = method_class(name).Config(**settings, prompts=prompts)
    found = [*renoisers(method_class(name).prepare(config, Workbench(config, teacher, "cpu")))]
    assert len(found) > 1 and {one.shift for one in found} == {expected}
