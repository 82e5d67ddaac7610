"""Teachers that look at a picture, distilled: students follow their pictures, also where fewstep is not installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import zoo_image
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from fewstep.cli import main
from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.programs.distillation import distill
from fewstep.recording import record
from fewstep.recording.items import as_items
from fewstep.recording.sizes import with_sizes
from tests.stock_process import PLAIN_TEXTS, WATCH, run_stock

pytestmark = pytest.mark.usefixtures("texts_as_they_are")
SOAK = pytest.mark.soak
SHORT = {"steps": 2, "max_steps": 2, "batch_size": 2, "lr": 1e-3, "cpu": True, "report_to": "none", "sample_steps": 0}
METHODS: dict[str, dict[str, Any]] = {
    "dmd2": {"critic_updates": 1},
    "rectified_flow": {"num_pairs": 2, "pair_steps": 2},
}
FORMS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora_rank": 4}}
SHOWN = (
    "InpaintXL9",
    "LTXImageToVideo",
    "Wan22TI2V",
    "WanFirstLastFrame",
    "HunyuanVideoImageToVideo",
    "QwenImageEditPlus",
    "ControlNetXL",
    "StableVideoDiffusion",
)
RUNS = [
    ("InstructPix2Pix", "dmd2", "lora"),
    ("InstructPix2Pix", "rectified_flow", "full"),
    *(
        pytest.param(name, method, form, marks=SOAK)
        for name in ("InstructPix2Pix", *SHOWN)
        for method in METHODS
        for form in FORMS
        if (name, method, form)
        not in (("InstructPix2Pix", "dmd2", "lora"), ("InstructPix2Pix", "rectified_flow", "full"))
    ),
]

# Where the scheduler starts and ends for each item, whose pictures lie in folders of their own.
_STOCK = (
    WATCH
    + PLAIN_TEXTS
    + """
import json, sys
import diffusers, numpy, torch
from PIL import Image
folder, base, items, out = sys.argv[1:]
about = json.load(open(folder + "/fewstep.json"))
if "lora" in about:
    pipe = diffusers.DiffusionPipeline.from_pretrained(base, **about["load"])
    pipe.load_lora_weights(folder, weight_name=about["lora"]["file"])
    scheduler = getattr(diffusers, about["scheduler"])
    pipe.scheduler = scheduler.from_pretrained(folder, subfolder="scheduler")
else:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **about["load"])
pipe.set_progress_bar_config(disable=True)
seen, saved = watch(type(pipe.scheduler)), {}
for number, item in enumerate(json.loads(items)):
    seen.clear()
    told = {n: Image.open(v) if v.endswith(".png") else v for n, v in item.items()}
    assert told.keys() == about["inputs"].keys()
    torch.manual_seed(0)
    pipe(**told, **about["call"], generator=torch.Generator().manual_seed(0))
    assert len(seen) == about["steps"]
    saved[f"first {number}"], saved[f"last {number}"] = (value.float().numpy() for value in (seen[0][0], seen[-1][1]))
numpy.savez(out, **saved)
"""
)


def written(items: list[dict[str, Any]], place: Path) -> list[dict[str, str]]:
    """The items with the places of their pictures."""
    found = []
    for number, item in enumerate(items):
        places = {name: str(place / f"{number}_{name}.png") for name, value in item.items() if name != "prompt"}
        for name, path in places.items():
            item[name].save(path)
        found.append({**item, **places})
    return found


def moved(student: Path, about: dict[str, Any], base: Path) -> float:
    """How far the furthest weight is from the teacher's."""
    if "lora" in about:
        return max(float(v.abs().max()) for k, v in load_file(student / about["lora"]["file"]).items() if "lora_B" in k)
    own, before = (
        {k: v for file in (folder / about["component"]).glob("*.safetensors") for k, v in load_file(file).items()}
        for folder in (student, base)
    )
    return max(float((own[key] - before[key]).abs().max()) for key in before)


def teacher_walk(name: str, about: dict[str, Any], items: list[dict[str, Any]], first: list[Tensor]) -> list[Tensor]:
    """What the teacher makes of the same starts on the student's grid."""
    recording = record(zoo_image.load(name), items=items, **zoo_image.call_of(name))
    denoiser = NetworkDenoiser(recording.network, recording.recipe, recording.schedule, recording.prediction_type)
    sampler = Sampler(recording.schedule, tuple(about["grid"]), "ode")
    shape = (1, *recording.sample_shape)
    with torch.no_grad():
        return [
            rollout(denoiser, sampler, x.reshape(shape), recording.condition(items=[item])) * recording.recipe.read
            for x, item in zip(first, items, strict=True)
        ]


@pytest.mark.parametrize(("name", "method", "form"), RUNS)
def test_students_follow_their_pictures(name: str, method: str, form: str, tmp_path: Path) -> None:
    zoo_image.load(name)  # or the test is skipped
    base, items = zoo_image.FOLDER / name, zoo_image.items_of(name)
    one_prompt = [{**item, **{key: items[0][key] for key in ("prompt",) if key in item}} for item in items]
    settings = {**SHORT, **METHODS[method], **FORMS[form], "call": zoo_image.call_of(name), "renoise": "ode"}
    student = distill(str(base), method, items=items, out=tmp_path / "run", **settings)
    about = json.loads((student / "fewstep.json").read_text())
    assert ("lora" in about) == (form == "lora")
    assert moved(student, about, base) > 1e-4

    out = tmp_path / "seen.npz"
    run_stock(_STOCK, str(student), str(base), json.dumps(written(one_prompt, tmp_path)), str(out))
    seen = numpy.load(out)
    first, last = ([torch.from_numpy(seen[f"{end} {k}"]) for k in range(2)] for end in ("first", "last"))
    teacher = teacher_walk(name, about, one_prompt, first)
    own = [x.reshape(teacher[0].shape) * (teacher[0] != 0) for x in last]
    assert (own[0] - own[1]).norm() >= 0.5 * (teacher[0] - teacher[1]).norm() > 0

    if method == "dmd2":
        listed = tmp_path / "items.jsonl"
        listed.write_text("".join(json.dumps(item) + "\n" for item in written(one_prompt, tmp_path)))
        words = ["sample", str(student), "--items", str(listed), "--out", str(tmp_path / "samples.png")]
        assert main([*words, *(["--base", str(base)] if "lora" in about else [])]) == 0
        assert len(numpy.unique(numpy.asarray(Image.open(tmp_path / "samples.png")))) > 2


@SOAK
@pytest.mark.parametrize("method", METHODS)
def test_a_student_of_pictures_of_two_sizes_answers_each_in_its_own(method: str, tmp_path: Path) -> None:
    """Two steps of two, so that each size is trained; the stock pipeline's walk is that of the trained network."""
    name = "InstructPix2Pix"
    zoo_image.load(name)  # or the test is skipped
    base, items = zoo_image.FOLDER / name, zoo_image.items_of(name, 4, "a b lower")
    for item in items[2:]:
        item["image"] = item["image"].resize((48, 32))
    settings = {**SHORT, **METHODS[method], "sample_steps": 2, "call": zoo_image.call_of(name), "renoise": "ode"}
    pairs = {"num_pairs": 8} if method == "rectified_flow" else {}
    student = distill(str(base), method, items=items, out=tmp_path / "run", **{**settings, **pairs})
    about = json.loads((student / "fewstep.json").read_text())
    assert about["inputs"]["image"] == "picture RGB 32x32 or picture RGB 48x32"
    assert 'load_image("image.png")' in (student / "README.md").read_text()
    assert moved(student, about, base) > 1e-4
    with Image.open(next((tmp_path / "run" / "samples").glob("*.png"))) as grid:
        assert grid.width >= 2 * (32 + 48)

    chosen, out = [items[0], items[2]], tmp_path / "seen.npz"
    run_stock(_STOCK, str(student), str(base), json.dumps(written(chosen, tmp_path)), str(out))
    seen = numpy.load(out)
    recording = with_sizes(record(zoo_image.load(name), items=items[:2], **zoo_image.call_of(name)), as_items(items))
    network = type(recording.network).from_pretrained(student / about["component"])
    denoiser = NetworkDenoiser(network, recording.recipe, recording.schedule, recording.prediction_type)
    sampler = Sampler(recording.schedule, tuple(about["grid"]), "ode")
    for number, item in enumerate(chosen):
        first, last = (torch.from_numpy(seen[f"{end} {number}"]) for end in ("first", "last"))
        with torch.no_grad():
            own = rollout(denoiser, sampler, first, recording.condition(items=[item]))
        assert first.shape[-1] * 32 == first.shape[-2] * item["image"].width
        assert float((own - last).norm() / last.norm()) < 1e-5
