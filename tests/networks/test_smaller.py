"""Students of another size than their teachers."""

from __future__ import annotations

import pytest
from tiny_pipelines import tiny_dit

from fewstep.errors import UserError
from fewstep.networks.smaller import resized_recording
from fewstep.recording import record


def test_what_the_teacher_left_at_its_default_is_changed_too() -> None:
    teacher = record(tiny_dit(), class_labels=[1])
    assert teacher.network.config.attention_bias and "attention_bias" in teacher.network.config["_use_default_values"]
    student = resized_recording(teacher, {"attention_bias": False, "num_layers": 1}, seed=0)
    assert not student.network.config.attention_bias and len(student.network.transformer_blocks) == 1
    assert not any(name.endswith("to_q.bias") for name in student.network.state_dict())
    assert len(teacher.network.transformer_blocks) == 2 and student.pipeline.transformer is student.network
    with pytest.raises(UserError, match="has no setting _use_default_values"):
        resized_recording(teacher, {"_use_default_values": []}, seed=0)
