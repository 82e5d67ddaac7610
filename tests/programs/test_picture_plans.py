"""Plans of pipelines that look at a picture: they are recorded without weights as with them, and planned whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import item_sets
import pinned_pipelines
import pytest
import torch
import zoo_image
from safetensors import safe_open

from fewstep.conditioning.conditioning import Conditioning
from fewstep.config.values import bytes_in_words
from fewstep.errors import UserError
from fewstep.programs.cache import cache
from fewstep.programs.methods import method_class
from fewstep.programs.planning import counting
from fewstep.programs.planning.counting import mean_calls
from fewstep.programs.planning.dry_run import DryRun
from fewstep.programs.planning.moments import weigh
from fewstep.programs.planning.plan import Planner
from fewstep.recording import Recording, record

pytestmark = pytest.mark.usefixtures("texts_as_they_are", "small_references", "short_period")

NAMES = ("ControlNetXL", "HunyuanVideoImageToVideo", "InpaintXL9", "InstructPix2Pix", "LTXImageToVideo")
NAMES += ("QwenImageEditPlus", "StableVideoDiffusion", "Wan22TI2V", "WanFirstLastFrame")


def soaked(*quick: str) -> list[Any]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.soak) for name in NAMES]


@pytest.fixture
def short_period(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are counted over fewer steps."""
    monkeypatch.setattr(counting, "PERIOD", 4)
    monkeypatch.setattr(counting, "_SEARCHED", 2)


def planner_of(folder: Path, items: list[dict[str, Any]], call: dict[str, Any], **settings: Any) -> Planner:
    settings = {"batch_size": 1, "cpu": True, "max_steps": 4, "steps": 1, "critic_updates": 1, **settings}
    config = method_class("dmd2").Config(teacher=str(folder), out="", call=call, **settings)
    return Planner(config, "dmd2", items=items)


def without_weights(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors"))
    return to


def same(found: Recording, expected: Recording) -> None:
    assert (found.component, found.prediction_type) == (expected.component, expected.prediction_type)
    assert (found.conditional, found.further) == (expected.conditional, expected.further)
    assert found.recipe.to_json() == expected.recipe.to_json()
    assert found.guidance.describe() == expected.guidance.describe()
    assert Conditioning(found.marked, 1).describe() == Conditioning(expected.marked, 1).describe()
    assert found.told is not None and expected.told is not None
    assert (found.told.pictures, found.told.untold) == (expected.told.pictures, expected.told.untold)
    assert found.told.items == expected.told.items and found.told.draws == expected.told.draws
    between = [None if one.between is None else one.between.describe() for one in (found, expected)]
    assert between[0] == between[1]


# One whose autoencoder is cast, and one whose pipeline reads its autoencoder's own numbers.
@pytest.mark.parametrize("name", soaked("LTXImageToVideo"))
def test_a_pipeline_is_recorded_without_weights_as_with_them(name: str, tmp_path: Path) -> None:
    pipeline, items, call = zoo_image.load(name), zoo_image.items_of(name), zoo_image.call_of(name)
    planner = planner_of(without_weights(zoo_image.FOLDER / name, tmp_path / name), items, call)
    same(planner.recording, record(pipeline, items=items, **call))


@pytest.mark.parametrize("name", soaked("InstructPix2Pix"))
def test_a_run_is_planned(name: str, tmp_path: Path) -> None:
    zoo_image.load(name)  # or it is skipped
    folder = without_weights(zoo_image.FOLDER / name, tmp_path / name)
    plan = planner_of(folder, zoo_image.items_of(name), zoo_image.call_of(name)).plan()
    assert plan.peak > plan.held > 0 and plan.encoding and plan.item
    assert plan.calls["teacher"].no_grad > 0


@pytest.mark.soak
@pytest.mark.parametrize("made", [pinned_pipelines.a_first_frame, pinned_pipelines.a_later_frame])
def test_a_frame_that_is_pinned_is_seen_without_weights(made: Any, tmp_path: Path) -> None:
    pipeline, items, call = made()
    pipeline.save_pretrained(tmp_path / "whole")
    planner = planner_of(without_weights(tmp_path / "whole", tmp_path / "teacher"), items, call)
    same(planner.recording, record(pipeline, items=items, **call))


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("name", ["InstructPix2Pix", "WanFirstLastFrame"])
@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2, "gradient_checkpointing": True}], ids=["full", "lora"])
def test_a_step_on_fake_tensors_takes_what_it_takes_on_real_ones(name: str, settings: Any, tmp_path: Path) -> None:
    pipeline, items, call = zoo_image.load(name), zoo_image.items_of(name), zoo_image.call_of(name)
    planner = planner_of(without_weights(zoo_image.FOLDER / name, tmp_path / name), items, call, **settings)
    planned = planner.plan()
    dry_run = DryRun(planner.config, "dmd2", record(pipeline, items=items, **call))
    method = dry_run.prepare()
    with torch.backends.mkldnn.flags(enabled=False):
        real = weigh(method, dry_run, 0)
    assert planned.moments.keys() == real.keys() == {"student", "critic"}
    for role, moment in real.items():
        assert planned.moments[role].graph == pytest.approx(moment.graph, rel=0.1)
        assert planned.moments[role].peak == pytest.approx(moment.peak, rel=0.1)
    assert planned.calls == mean_calls(planner.config, "dmd2", dry_run.recording)


def of_two_sizes() -> list[dict[str, Any]]:
    sizes = [(16, 16), (16, 16), (32, 32)]
    return [{"prompt": "abc"[n], "image": item_sets.picture(n, size)} for n, size in enumerate(sizes)]


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("editor") / "pipeline"
    item_sets.tiny_editor().save_pretrained(folder)
    return folder


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_a_plan_of_items_of_two_sizes_is_of_the_largest(editor: Path) -> None:
    items = of_two_sizes()
    turned = {**items[2], "image": items[2]["image"].rotate(90)}
    both, large = (planner_of(editor, some, {}).plan() for some in (items, [items[2], turned]))
    assert both.sample_shape == large.sample_shape == (4, 16, 16)
    assert both.moments == large.moments and both.encoding == large.encoding
    assert "3 items in 2 forms" in both.items and both.notes == [
        "samples of 2 sizes, each step of one: what a step takes is the most"
    ]


def test_what_encoded_items_take_is_what_their_cache_holds(editor: Path, tmp_path: Path) -> None:
    out = cache(editor, tmp_path / "cache", items=of_two_sizes(), cpu=True)
    with safe_open(str(out / "shard_00000.safetensors"), "pt") as file:
        held = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    planned = planner_of(editor, of_two_sizes(), {}).planned
    assert planned is not None and f"3 items in 2 forms take about {bytes_in_words(held)} once" in planned.words
    assert [one.sample_shape for one, _ in planned.largest] == [(4, 16, 16)]


def test_a_plan_refuses_what_a_run_refuses_of_its_items(editor: Path) -> None:
    with pytest.raises(UserError, match="--data targets is the column target of the items, and no row has one"):
        planner_of(editor, of_two_sizes()[:2], {}, data="targets", gan_weight=0.1)
