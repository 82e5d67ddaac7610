"""Teachers that look at a picture, distilled: students follow their pictures, also where fewstep is not installed."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import zoo_image
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from fewstep import load
from fewstep.cli import main
from fewstep.conditioning.ragged import AnyConditioning, join, with_others
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.ode import OdeSolver, teacher_times
from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.diffusion.schedule import FlowSchedule
from fewstep.errors import UserError
from fewstep.export.walk.control import as_walked
from fewstep.export.walk.teacher_shift import teacher_shift
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.programs.distillation import distill
from fewstep.recording import Recording, record
from fewstep.recording.call.items import as_items
from fewstep.recording.sizes import with_sizes
from tests.guided_teachers import guided_teacher
from tests.stock_process import PLAIN_TEXTS, WATCH, allowed, run_stock

pytestmark = pytest.mark.usefixtures("texts_as_they_are", "small_references")
SOAK = pytest.mark.soak
SHORT = {"steps": 2, "max_steps": 2, "batch_size": 2, "lr": 1e-3, "cpu": True, "report_to": "none", "sample_steps": 0}
METHODS: dict[str, dict[str, Any]] = {
    "dmd2": {"critic_updates": 1},
    "rectified_flow": {"num_pairs": 2, "pair_steps": 2},
}
FORMS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora_rank": 4}}
#: Its network loads no LoRA, so that one is merged into it.
MERGED = "StableVideoDiffusion"
QUICK = [("InstructPix2Pix", "dmd2", "lora"), ("InstructPix2Pix", "rectified_flow", "full")]
RUNS = [
    *QUICK,
    *(
        pytest.param(name, method, form, marks=SOAK)
        for name in zoo_image.TRAINED
        for method in METHODS
        for form in FORMS
        if (name, method, form) not in QUICK
    ),
]
#: Items whose samples are told apart.
COUNT = 8
#: Of the teacher's whole walk.
TEACHER_STEPS = 25

# Where the scheduler starts and ends for each item, whose pictures lie in folders of their own.
_STOCK = (
    WATCH
    + PLAIN_TEXTS
    + zoo_image.SMALL_REFERENCES
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
def shown(value):
    if isinstance(value, list):
        return [shown(one) for one in value]
    return Image.open(value) if value.endswith(".png") else value
for number, item in enumerate(json.loads(items)):
    seen.clear()
    assert item.keys() == about["inputs"].keys()
    torch.manual_seed(0)
    told = {name: shown(value) for name, value in item.items()}
    pipe(**told, **about["call"], generator=torch.Generator().manual_seed(0))
    assert len(seen) == about["steps"]
    saved[f"first {number}"], saved[f"last {number}"] = (value.float().numpy() for value in (seen[0][0], seen[-1][1]))
numpy.savez(out, **saved)
"""
)


@dataclass(frozen=True)
class Shown:
    """A teacher of the folder, and items for it: of prompts and pictures of their own, and of one prompt."""

    recording: Recording
    call: dict[str, Any]
    items: list[dict[str, Any]]
    one_prompt: list[dict[str, Any]]

    @functools.cached_property
    def guided(self) -> GuidedDenoiser:
        """As it is asked in a run."""
        return guided_teacher(self.recording, self.call)[1]

    @functools.cached_property
    def told(self) -> AnyConditioning:
        """What its network is told of the items, further answers and all."""
        positive = self.recording.condition_each(items=self.items)
        return join(
            [with_others(*pair) for pair in zip(positive, self.recording.negative_each(self.items), strict=True)]
        )

    def walk(self, denoiser: Denoiser, grid: tuple[float, ...], first: Tensor, told: AnyConditioning) -> Tensor:
        """Where a walk from first samples (B, ...) ends, 0 where the network is told nothing of it."""
        sampler = Sampler(self.recording.schedule, grid, "ode")
        x = first.reshape(-1, *self.recording.sample_shape)
        with torch.no_grad():
            return (
                rollout(denoiser, sampler, x.expand(told.batch_size, *x.shape[1:]), told) * self.recording.recipe.read
            )

    def ends(self, first: Tensor) -> Tensor:
        """Where the teacher's whole ODE leads from a first sample (1, ...), for each item.

        Without guidance: two training steps leave the student where it began, and that is the teacher unguided.
        """
        recording = self.recording
        shift = teacher_shift(recording) if isinstance(recording.schedule, FlowSchedule) else 1.0
        times = teacher_times(recording.schedule, TEACHER_STEPS, shift)
        x = first.reshape(1, *recording.sample_shape).expand(COUNT, *recording.sample_shape)
        with torch.no_grad():
            ends = OdeSolver(self.guided.denoiser, recording.schedule).to_data(x, times, self.told)
        return ends * recording.recipe.read


@functools.lru_cache(maxsize=1)
def shown(name: str) -> Shown:
    pipeline, items, call = zoo_image.load(name), zoo_image.items_of(name, COUNT), zoo_image.call_of(name)
    recording = record(pipeline, items=items[:2], **call)
    own = [{**item, **{key: items[0][key] for key in ("prompt",) if key in item}} for item in items[:2]]
    return Shown(recording, call, items, own)


def written(items: list[dict[str, Any]], place: Path) -> list[dict[str, Any]]:
    """The items with the places of their pictures."""

    def kept(value: Any, stem: str) -> Any:
        if isinstance(value, list):
            return [kept(one, f"{stem}_{number}") for number, one in enumerate(value)]
        value.save(place / f"{stem}.png")
        return str(place / f"{stem}.png")

    return [
        {name: value if name == "prompt" else kept(value, f"{number}_{name}") for name, value in item.items()}
        for number, item in enumerate(items)
    ]


def moved(student: Path, about: dict[str, Any], base: Path) -> float:
    """How far the furthest weight is from the teacher's."""
    if "lora" in about:
        return max(float(v.abs().max()) for k, v in load_file(student / about["lora"]["file"]).items() if "lora_B" in k)
    own, before = (
        {k: v for file in (folder / about["component"]).glob("*.safetensors") for k, v in load_file(file).items()}
        for folder in (student, base)
    )
    return max(float((own[key] - before[key]).abs().max()) for key in before)


def own_teachers(samples: Tensor, ends: Tensor) -> int:
    """How many samples (B, ...) are nearest to the teacher's end of their own item, each set's mean taken away."""
    samples, ends = ((x - x.mean(0)).flatten(1) for x in (samples, ends))
    return int((torch.cdist(samples, ends).argmin(1) == torch.arange(len(samples))).sum())


@pytest.mark.parametrize(("name", "method", "form"), RUNS)
def test_students_follow_their_pictures(name: str, method: str, form: str, tmp_path: Path) -> None:
    teacher = shown(name)
    base, recording = zoo_image.FOLDER / name, teacher.recording
    assert teacher.guided.calls == recording.further + 1 > 1
    settings = {**SHORT, **METHODS[method], **FORMS[form], "call": teacher.call, "renoise": "ode"}
    student = distill(str(base), method, items=teacher.items, out=tmp_path / "run", **settings)
    about = json.loads((student / "fewstep.json").read_text())
    assert ("lora" in about) == (form == "lora" and name != MERGED)
    assert moved(student, about, base) > 1e-4

    # Without fewstep: two pictures, one prompt, one noise.
    out = tmp_path / "seen.npz"
    run_stock(_STOCK, str(student), str(base), json.dumps(written(teacher.one_prompt, tmp_path)), str(out))
    seen = numpy.load(out)
    first, last = ([torch.from_numpy(seen[f"{end} {k}"]) for k in range(2)] for end in ("first", "last"))
    last = [x.reshape(1, *recording.sample_shape) * recording.recipe.read for x in last]

    # The walk that was trained is that of the stock pipeline.
    pipeline = load(student, **({"base": str(base)} if "lora" in about else {}))
    walked = as_walked(recording, pipeline, about["call"], about["steps"]).recipe
    network = getattr(pipeline, recording.component)
    own = NetworkDenoiser(network, walked, recording.schedule, recording.prediction_type)
    grid = tuple(about["grid"])
    for x, end, item in zip(first, last, teacher.one_prompt, strict=True):
        ours = teacher.walk(own, grid, x, recording.condition(items=[item]))
        assert (ours - end).abs().max() <= allowed(x, end) * end.abs().max()

    # Two pictures give two samples.
    told = [recording.condition(items=[item]) for item in teacher.one_prompt]
    theirs = [teacher.walk(teacher.guided.denoiser, grid, x, one) for x, one in zip(first, told, strict=True)]
    assert (last[0] - last[1]).norm() >= 0.5 * (theirs[0] - theirs[1]).norm() > 0

    # Each of eight is nearest to its own item's teacher, if no more often than the teacher's own few steps are.
    ends = teacher.ends(first[0])
    few = own_teachers(teacher.walk(teacher.guided.denoiser, grid, first[0], teacher.told), ends)
    assert own_teachers(teacher.walk(own, grid, first[0], teacher.told), ends) >= few - 1

    if (name, method) == ("InstructPix2Pix", "dmd2"):
        listed = tmp_path / "items.jsonl"
        listed.write_text("".join(json.dumps(item) + "\n" for item in written(teacher.one_prompt, tmp_path)))
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


@SOAK
def test_a_student_that_is_never_under_control_is_refused(tmp_path: Path) -> None:
    teacher = shown("ControlNetXL")
    settings = {**SHORT, **METHODS["dmd2"], "call": teacher.call, "steps": 1}
    with pytest.raises(UserError, match="never switches its controlnet on in 1 step, so such a student would not look"):
        distill(str(zoo_image.FOLDER / "ControlNetXL"), "dmd2", items=teacher.items, out=tmp_path / "run", **settings)
    assert not (tmp_path / "run" / "student").exists()
