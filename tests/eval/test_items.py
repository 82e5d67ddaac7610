"""Items in an evaluation: the pipeline is called with each item's own pictures."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from item_sets import picture, tiny_editor, write_items
from PIL import Image

from fewstep.cli import main
from fewstep.conditioning.item import Item
from fewstep.data.items import read_items
from fewstep.errors import UserError
from fewstep.eval import evaluate, sample
from fewstep.eval.conditions import SampleConditions
from fewstep.eval.config import EvalConfig
from fewstep.eval.generate import generate, sample_generator
from fewstep.training.pictures import in_size

generating = importlib.import_module("fewstep.eval.generate")
CALL = {"num_inference_steps": 2, "guidance_scale": 4.0, "image_guidance_scale": 1.5}


def test_each_sample_is_what_the_stock_pipeline_makes_of_its_own_item(editor: Path, items: Path, tmp_path: Path):
    path = sample(editor, items=items, steps=2, seed=4, out=tmp_path / "all.png")
    pipeline, drawn = tiny_editor(), []
    for number in range(3):
        asked = {"prompt": f"the {'abc'[number]}", "image": picture(number), "num_inference_steps": 2}
        made = pipeline(**asked, generator=sample_generator(4, number), output_type="np").images[0]
        drawn.append((made * 255 + 0.5).astype(np.uint8))
    shown = np.asarray(Image.open(path)).astype(int)
    places = [
        any(
            np.abs(shown[y : y + 16, x : x + 16] - one).max() <= 1
            for y in range(shown.shape[0] - 15)
            for x in range(shown.shape[1] - 15)
        )
        for one in drawn
    ]
    assert places == [True] * 3, "a sample is not its own item's"
    assert len({one.tobytes() for one in drawn}) == 3


def test_a_sample_does_not_depend_on_its_neighbours(editor: Path, items: Path) -> None:
    pipeline, calls = tiny_editor(), []
    inner = pipeline.vae.decode
    pipeline.vae.decode = lambda latents, *args, **kwargs: (
        calls.append(len(latents)),
        inner(latents, *args, **kwargs),
    )[1]
    conditions = SampleConditions("item", tuple(read_items(items, type(pipeline)).each))
    one, all_three = made(pipeline, conditions, 1), made(pipeline, conditions, 3)
    assert (one.int() - all_three.int()).abs().max() <= 1 and conditions.prompts([3, 1]) == ["the a", "the b"]
    assert calls == [1, 1, 1, 1, 1, 2, 3], "three alone; two alone and together, and then all at once"


def test_a_pipeline_to_which_a_list_is_one_items_is_called_once_for_each(
    items: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some take several references of one prompt, some one picture for all prompts."""

    def of_first(self: Any, prompt: Any, image: Any, **call: Any) -> Any:
        return stock(self, prompt=prompt, image=image[0] if isinstance(image, list) else image, **call)

    def none(self: Any, prompt: Any, image: Any, **call: Any) -> Any:
        if isinstance(image, list):
            raise ValueError("one picture, please")
        return stock(self, prompt=prompt, image=image, **call)

    conditions = SampleConditions("item", tuple(read_items(items, type(tiny_editor())).each))
    stock = type(tiny_editor()).__call__
    expected = made(tiny_editor(), conditions, 1)
    for other in (of_first, none):
        monkeypatch.setattr(type(tiny_editor()), "__call__", other)
        assert torch.equal(made(tiny_editor(), conditions, 3), expected)


def test_items_that_share_an_argument_prove_nothing_of_lists(items: Path) -> None:
    pipeline = tiny_editor()
    each = read_items(items, type(pipeline)).each
    alike = [Item({"prompt": "the a", "image": item.arguments["image"]}) for item in each]
    assert torch.equal(
        made(pipeline, SampleConditions("item", tuple(alike)), 3),
        made(pipeline, SampleConditions("item", tuple(alike)), 1),
    )
    assert pipeline not in generating._SEVERAL


def made(pipeline: Any, conditions: SampleConditions, batch_size: int) -> torch.Tensor:
    """Three samples."""
    batches = generate(pipeline, CALL, conditions, range(3), seed=1, batch_size=batch_size)
    return torch.cat([batch.images for batch in batches])


def test_the_command_measures_a_teacher_with_items(editor: Path, items: Path, tmp_path: Path) -> None:
    words = ["eval", "--teacher", str(editor), "--teacher_steps", "1,2", "--items", str(items), "--cpu", "--num", "3"]
    assert main([*words, "--metrics", "saturation", "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["conditions"]["kind"] == "item"
    assert report["conditions"]["shown"][:3] == [f"row {number} of items.jsonl" for number in (1, 2, 3)]
    assert [row["nfe"] for row in report["rows"]] == [3.0, 6.0], "three answers in each step"


def test_samples_of_several_sizes_are_shown_each_in_its_own_and_measured_in_the_firsts(
    editor: Path, tmp_path: Path
) -> None:
    mixed = write_items(tmp_path / "mixed", 2, ((16, 16), (24, 16)))
    with Image.open(sample(editor, items=mixed, steps=1, out=tmp_path / "a.png")) as sheet:
        assert sheet.width >= 2 * 24 and (np.asarray(sheet)[:16, 16:24] == 255).all()
    pipeline = tiny_editor()
    conditions = SampleConditions("item", tuple(read_items(mixed, type(pipeline)).each))
    each = list(generate(pipeline, {"num_inference_steps": 1}, conditions, range(4), seed=0, batch_size=4))
    assert [tuple(one.images.shape[-2:]) for one in each] == [(16, 16), (16, 24)] * 2
    assert in_size(each[1].images, (16, 16)).shape == each[0].images.shape


def test_other_pictures_are_another_evaluation(editor: Path, tmp_path: Path) -> None:
    options = {"teacher": str(editor), "teacher_steps": (1,), "metrics": ("saturation",), "num": 2, "device": "cpu"}
    file = write_items(tmp_path / "items", 2)
    reports = [evaluate([], EvalConfig(out=tmp_path / "one", items=str(file), **options))]
    picture(7).save(tmp_path / "items" / "0.png")
    reports.append(evaluate([], EvalConfig(out=tmp_path / "two", items=str(file), **options)))
    one, two = (report.protocol["conditions_sha256"] for report in reports)
    assert one != two
    given = [{"prompt": "the a", "image": picture(7)}, {"prompt": "the b", "image": picture(1)}]
    evaluate([], EvalConfig(out=tmp_path / "three", items=given, **options))


def test_what_items_cannot_be_is_named(editor: Path, items: Path, student: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="items hold the prompts: give them alone"):
        sample(editor, items=items, prompt="a", steps=1, out=tmp_path / "a.png")
    with pytest.raises(UserError, match="was distilled without pictures"):
        sample(student, items=items, out=tmp_path / "a.png")
    with pytest.raises(UserError, match="by prompts, by classes, by items or by nothing: give one"):
        EvalConfig(items=str(items), classes=[1])
    mixed = write_items(tmp_path / "mixed", 2, ((16, 16), (24, 16)))
    (tmp_path / "mixed" / "1.png").unlink()
    with pytest.raises(UserError, match=r"row 2 of items\.jsonl: image: there is no file"):
        sample(editor, items=mixed, steps=1, out=tmp_path / "a.png")
