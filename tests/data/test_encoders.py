"""Text encoders are freed once all is encoded; the pipeline still decodes and walks; they come back for the export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from item_sets import tiny_editor, write_items
from tiny_pipelines import tiny_flow, tiny_stable_diffusion

from fewstep.data.encoders import Encoders
from fewstep.data.items import read_items
from fewstep.errors import UserError
from fewstep.export.walk.plan import check_student, plan_student
from fewstep.recording import Recording, RecordingError, record
from fewstep.recording.sizes import with_sizes
from fewstep.teachers.loading import load_teacher

CALL = {"height": 16, "width": 16, "max_sequence_length": 8}


def recorded(folder: Path) -> Recording:
    tiny_flow().save_pretrained(folder)
    return record(load_teacher(str(folder)), prompt="the cat", **CALL)


def encoders(recording: Recording, folder: Path, call: dict[str, Any] | None = None) -> Encoders:
    chosen = {**CALL, "num_inference_steps": 2, **recording.off} if call is None else call
    return Encoders(recording, chosen, lambda parts: load_teacher(str(folder), **parts))


def test_freed_and_brought_back(tmp_path: Path) -> None:
    recording = recorded(tmp_path)
    pipeline = recording.pipeline
    before = {name: value.clone() for name, value in pipeline.text_encoder_3.state_dict().items()}
    x0 = torch.randn(1, *recording.sample_shape)
    image, plan = recording.decode(x0), plan_student(recording, 2)
    away = encoders(recording, tmp_path, plan.call)
    line = away.free()
    assert "freed text_encoder, text_encoder_2, text_encoder_3" in line
    for part in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
        assert sum(parameter.numel() for parameter in part.parameters()) == 0
    assert pipeline.transformer.pos_embed.proj.weight.numel() > 0
    # What still runs the pipeline gives what it gave.
    assert torch.equal(recording.decode(x0), image)
    assert check_student(recording, pipeline, plan.call, plan.move, 2) is not None
    with pytest.raises(RecordingError, match="is freed, and was never asked this before"):
        recording.condition(prompts=["something else"])
    away.restore()
    after = pipeline.text_encoder_3.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert "forward" not in vars(pipeline.text_encoder_3)
    assert recording.condition(prompts=["something else"]).batch_size == 1
    away.restore()  # nothing to do any more


def test_samples_of_another_size_are_decoded_while_the_encoders_are_away(tmp_path: Path) -> None:
    """Each size has an item of its own, with another prompt."""
    tiny_editor().save_pretrained(tmp_path)
    items = read_items(write_items(tmp_path / "items", 4, ((16, 16), (32, 16))), type(tiny_editor()))
    recording = with_sizes(record(load_teacher(str(tmp_path)), items=items.two()), items.each, proven=False)
    (other,) = (one.sample_shape for one in recording.sizes)
    samples = [torch.randn(1, *shape) for shape in (recording.sample_shape, other)]
    images = [recording.decode(x0) for x0 in samples]
    assert "freed text_encoder" in encoders(recording, tmp_path, recording.off).free()
    assert all(torch.equal(recording.decode(x0), image) for x0, image in zip(samples, images))


def test_a_teacher_that_changed_meanwhile_is_not_exported(tmp_path: Path) -> None:
    recording = recorded(tmp_path)
    away = encoders(recording, tmp_path)
    assert away.free()
    other = tiny_flow()
    with torch.no_grad():
        other.text_encoder_2.text_projection.weight[0, 0] += 1
    other.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="text_encoder_2 has changed"):
        away.restore()


def test_encoders_that_are_used_otherwise_than_by_their_call_stay(tmp_path: Path) -> None:
    pipeline = tiny_stable_diffusion()
    pipeline.save_pretrained(tmp_path)

    class Peeking(type(pipeline)):
        def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
            table = next(module for module in self.text_encoder.modules() if isinstance(module, torch.nn.Embedding))
            table(torch.tensor([[1]]))
            return super().encode_prompt(*args, **kwargs)

    pipeline.__class__ = Peeking
    recording = record(pipeline, prompt="the cat")
    before = recording.condition(prompts=["a dog"])
    call = {"num_inference_steps": 2, **recording.off}
    line = Encoders(recording, call, lambda parts: load_teacher(str(tmp_path), **parts)).free()
    assert line.startswith("text_encoder stay in memory")
    after = recording.condition(prompts=["a dog"])
    assert torch.equal(before.arguments()["encoder_hidden_states"], after.arguments()["encoder_hidden_states"])


def test_the_callers_own_pipeline_is_left_alone_on_a_cpu() -> None:
    recording = record(tiny_stable_diffusion(), prompt="the cat")
    said: list[str] = []
    with Encoders(recording, {"num_inference_steps": 2, **recording.off}).away(said.append):
        assert recording.condition(prompts=["a dog"]).batch_size == 1
    assert said == [""]


def test_a_pipeline_without_text_has_nothing_to_free(tmp_path: Path) -> None:
    from tiny_pipelines import tiny_dit

    recording = record(tiny_dit(), class_labels=[1])
    call = {"num_inference_steps": 2, **recording.off}
    assert Encoders(recording, call, lambda parts: load_teacher(str(tmp_path), **parts)).free() == ""
