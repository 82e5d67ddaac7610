"""Of which kind each setting is: what a resumed run may change, what is published, what makes a cell stale."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest

from fewstep.config.checks import KINDS, Settings, names_of, setting
from fewstep.config.run import RunConfig
from fewstep.programs.methods import method_class, methods
from fewstep.trainers.rectified_flow import RectifiedFlowConfig


def test_a_plain_setting_is_one_that_the_student_comes_of() -> None:
    @dataclass(kw_only=True)
    class Example(Settings):
        given: str = setting("source")
        cpu: bool = setting("machine", False)
        alpha: float = 1.0

    assert [names_of(Example, kind) for kind in ("result", "source", "machine")] == [{"alpha"}, {"given"}, {"cpu"}]
    assert names_of(Example, "source", "machine", "length") == {"given", "cpu"}
    assert (Example(given="a").cpu, Example(given="a", cpu=True).cpu) == (False, True)
    with pytest.raises(TypeError, match="given"):
        Example()


@pytest.mark.parametrize("method", methods())
def test_every_setting_of_a_method_is_of_one_kind(method: str) -> None:
    config_class = method_class(method).Config
    sorted_out = [name for kind in KINDS for name in names_of(config_class, kind)]
    assert sorted(sorted_out) == sorted(field.name for field in fields(config_class))
    # A method that gives a shared setting another default says its kind again.
    shared = {field.name for field in fields(RunConfig)}
    if "teacher_variant" in sorted_out:  # whose own --variant is a paper's, and no teacher's
        shared -= {"variant"}
    for kind in KINDS:
        assert names_of(config_class, kind) & shared == names_of(RunConfig, kind) & shared


def test_a_students_card_says_nothing_of_the_machine() -> None:
    """Where things lie; which of a teacher's files are meant, fewstep.json says by itself."""
    private = {"teacher", "teacher_lora", "out", "prompts", "items", "cache", "pairs", "inverted_pairs", "data", "init"}
    private |= {
        "attention_backend",
        "lora_walks",
        "sequential_guidance",
        "push_to_hub",
        "hub_private",
        "data_workers",
        "eval_weights",
        "sharding",
        "sharding_group",
        "sharding_offload",
        "resume",
        "compile",
        "cpu",
        "report_to",
        "revision",
        "subfolder",
        "variant",
    }
    assert names_of(RectifiedFlowConfig, "source", "machine") == private
