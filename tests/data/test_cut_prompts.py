"""How many prompts were cut at their encoder's length is said once."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from tiny_pipelines import tiny_dit, tiny_flow, tiny_stable_diffusion

from fewstep.data.conditions import Conditions, CutPrompts
from fewstep.programs.cache import cache
from fewstep.recording import record
from fewstep.recording.watch.cut_texts import cut_texts

LONG = "the cat " * 60


def _records() -> tuple[logging.Handler, list[str]]:
    said: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    return Kept(), said


def test_a_run_says_once_how_many_prompts_were_cut() -> None:
    pipeline = tiny_stable_diffusion()
    limit = pipeline.tokenizer.model_max_length
    handler, said = _records()
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        recording = record(pipeline, prompt=LONG)
        conditions = Conditions(recording, ["the cat", LONG, "the dog", f"a {LONG}"])
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert conditions.cut_note == (
        f"2 of 4 prompts are longer than the encoder reads and were cut (tokenizer at {limit} tokens)"
    )
    assert [line for line in said if "truncated" in line or "longer than" in line] == []


def test_nothing_is_said_of_prompts_that_fit() -> None:
    recording = record(tiny_stable_diffusion(), prompt="the cat")
    assert Conditions(recording, ["the cat", "the dog"]).cut_note == ""
    assert Conditions(record(tiny_dit()), labels=[0, 1]).cut_note == ""
    assert CutPrompts().note(3) == ""


def test_every_encoder_has_its_own_length() -> None:
    pipeline = tiny_flow()
    recording = record(pipeline, prompt="the cat", height=16, width=16, max_sequence_length=8)
    with cut_texts(pipeline) as cut:
        recording.condition_each(["the cat the dog the cat the dog"])
    assert cut == {"tokenizer_3": 8} or cut == {"tokenizer": 8}, cut
    cut_prompts = CutPrompts(2, {"tokenizer_3": 8, "tokenizer": 77})
    assert cut_prompts.note(5).endswith("(tokenizer at 77 tokens, tokenizer_3 at 8 tokens)")


def test_tokenizers_are_left_as_found() -> None:
    pipeline = tiny_stable_diffusion()
    kind, ids = type(pipeline.tokenizer), pipeline.tokenizer(LONG, truncation=True).input_ids
    with cut_texts(pipeline) as cut:
        assert isinstance(pipeline.tokenizer, kind) and type(pipeline.tokenizer).__name__ == kind.__name__
        assert pipeline.tokenizer(LONG, truncation=True).input_ids == ids
        assert pipeline.tokenizer([LONG, "a"], truncation=True, max_length=5).input_ids[0] == [*ids[:4], ids[-1]]
    assert type(pipeline.tokenizer) is kind and cut


@pytest.mark.parametrize("name", ["Flux", "StableDiffusionXL"])
def test_pipelines_with_several_encoders(zoo: Path, name: str) -> None:
    if not (zoo / name).is_dir():
        pytest.skip(f"needs {name} in --zoo DIR")
    pipeline = DiffusionPipeline.from_pretrained(zoo / name, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    recording = record(pipeline, prompt="a b", height=32, width=32)
    note = Conditions(recording, ["a b", "a b lower " * 600]).cut_note
    assert note.startswith("1 of 2 prompts are longer") and "tokenizer at" in note and "tokenizer_2 at" in note


def test_a_cache_says_it_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fewstep"):
        cache(tiny_stable_diffusion(), tmp_path / "cache", prompts=["the cat", LONG], cpu=True)
    (line,) = [record.getMessage() for record in caplog.records if "were cut" in record.getMessage()]
    assert line.startswith("1 of 2 prompts")
