"""Several processes, and one, with the same samples in a step: the same losses, gradients and weights."""

from __future__ import annotations

import copy
import functools
import json
import logging
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.programs import distillation
from fewstep.programs.methods import methods
from fewstep.recording.watch.shake import shaken
from fewstep.training import held
from fewstep.training.run_folder import read_config
from tests.checkpoints import load_latest
from tests.end_to_end.method_cases import CASES, LORA, RUN
from tests.forked import well
from tests.item_sets import tiny_editor, write_items
from tests.tiny_pipelines import tiny_stable_diffusion

EVERY = [
    pytest.param(
        case, lora, marks=[] if (case, lora) == ("dmd2", False) else pytest.mark.soak, id=case + " lora" * lora
    )
    for case, (_, settings) in CASES.items()
    for lora in (False, True)
    if not (lora and "student_network" in settings)  # which is trained whole
]
#: Logged numbers that are no means over samples: roots, ratios, and norms, which have their own comparison.
NO_MEANS = ("_std", "/lag", "/derivative", "/gradient", "/gradient_norm", "seconds", "step", "/velocity_error")
NO_MEANS += ("/unrewarded_teacher",)
#: A constant that is added to all keys changes no attention, nor one to a map that is then normalised by itself: the
#: gradient is rounding alone, and so is AdamW's step.
NO_GRADIENT = ("to_k.bias", ".body.0.bias", ".body.3.bias")
#: Parts of the names of weights that start at zero, and after a few steps are no larger than those.
AT_ZERO = ("lora_", "second_time.heads")
#: Gradients of small differences (of a consistency model's two answers, of what PCM's discriminator sees of them, of
#: teacher and critic, of three guided answers) have lost digits, and networks round otherwise for another batch size.
#: One process with micro-batches differs from one without as much.
LOST_DIGITS = {"consistency": 1e-4, "segmented consistency": 1e-4, "pcm": 1e-4, "sid": 3e-5, "dmd2, items": 5e-5}
#: Cases whose samples are weighed by their micro-batch.
WEIGHED = {"f-distill", "sida"}
#: Cases whose steps are not all alike.
STAGED = ("any_flow", "any_flow, data", "disback", "flash_dmd, preferences", "hyper_sd", "mf_rae", "mft", "phased")
STAGED += ("multi_student, smaller", "tscd")
#: Of each of two processes.
SHARE = {"batch_size": 2, "gradient_accumulation_steps": 1}


@dataclass(frozen=True)
class Trained:
    """What a run left: its first logged numbers, its first gradients after the sum, and its last weights."""

    losses: dict[str, float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def train(pipeline: Any, out: Path, method: str, settings: dict[str, Any], rank: int = 0) -> None:
    """A run without its export, in a process of its own; the gradients of its first step lie beside it."""
    noted: list[Tensor] = []
    add_up = held.sum_over_processes

    def noting(tensors: list[Tensor]) -> None:
        add_up(tensors)
        if not (out / "metrics.jsonl").exists():
            noted.extend(tensor.clone() for tensor in tensors)

    logging.basicConfig(format="%(message)s")
    logging.getLogger("fewstep").setLevel(logging.INFO)
    held.sum_over_processes = noting
    distillation.export = lambda *_: SimpleNamespace(note="", folders=[])
    distillation.distill(pipeline, method, out=str(out), **{**RUN, **settings})
    save_file({f"{number:05d}": tensor for number, tensor in enumerate(noted)}, f"{out}_{rank}.safetensors")


def trained(place: Path, pipeline: Any, case: str, processes: int, share: dict[str, int], **more: Any) -> Trained:
    """One run of a case on several processes."""
    method, settings = CASES[case]
    settings = {**settings, **share, **more}
    if "data" in settings:
        settings["data"] = str(place.parent / "images")
    if "init" in settings:
        settings["init"] = str(begun(place.parent, pipeline, {name: more[name] for name in LORA if name in more}))
    kind = settings.pop("teacher", None)
    if kind == "text":
        (place.parent / "prompts.txt").write_text("a cat\na dog\ntwo cats\n")
        settings |= {"classes": None, "prompts": str(place.parent / "prompts.txt"), "merge": False}
        pipeline = texts()
    if kind == "items":
        settings |= {"classes": None, "items": str(write_items(place.parent / "items", 3))}
        pipeline = editor()
    work = partial(train, pipeline, place, method, settings)
    well(processes, lambda rank: work(rank), Path(f"{place}_said"))
    return found(place)


def begun(folder: Path, pipeline: Any, form: dict[str, Any]) -> Path:
    """A run of DMD2, for others to go on from; made once."""
    out = folder / f"begun{' lora' * bool(form)}"
    if not out.exists():
        settings = {"critic_updates": 1, "max_steps": 2, "batch_size": 2, "lr": 1e-2, **form}
        well(1, lambda rank: train(pipeline, out, "dmd2", settings, rank), Path(f"{out}_said"))
    return out


def found(place: Path) -> Trained:
    lines = (place / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    losses = {name: value for name, value in first.items() if not name.endswith(NO_MEANS)}
    tensors = load_latest(place / "checkpoints")[1]
    weights = {f"{role}/{name}": value for role, kept in tensors.items() for name, value in kept.items()}
    weights = {name: value for name, value in weights.items() if "optimizer" not in name and "unlogged" not in name}
    return Trained(losses, load_file(f"{place}_0.safetensors"), weights)


def largest(tensors: Iterable[Tensor]) -> float:
    return max(float(tensor.abs().max()) for tensor in tensors)


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Relative to each tensor's largest entry, or a thousandth of that of all: there are tensors of rounding alone."""
    assert ours.keys() == theirs.keys() and ours
    least = 1e-3 * largest(ours.values())
    apart = {name: largest([value - theirs[name]]) / max(largest([value]), least) for name, value in ours.items()}
    assert max(apart.values()) < tolerance, apart


def assert_same_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """Relative to each tensor's largest entry, or of what starts at zero (adapters, second times), to its role's."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        role = name.partition("/")[0] + "/"
        alone = not any(part in name for part in AT_ZERO)
        of = [value] if alone else [kept for one, kept in ours.items() if one.startswith(role)]
        if not name.endswith(NO_GRADIENT):
            assert largest([value - theirs[name]]) <= tolerance * largest(of), name


@functools.cache
def texts() -> Any:
    """A teacher of prompts."""
    pipeline = tiny_stable_diffusion()
    with shaken(pipeline.unet):
        return copy.deepcopy(pipeline)


@functools.cache
def editor() -> Any:
    """A teacher of prompts with a picture each, which is guided by three answers."""
    pipeline = tiny_editor()
    with shaken(pipeline.unet):
        return copy.deepcopy(pipeline)


def assert_same(case: str, ours: Trained, theirs: Trained) -> None:
    """The same losses, gradients and weights, but for rounding."""
    highest = max(map(abs, ours.losses.values()))
    assert theirs.losses == pytest.approx(ours.losses, rel=0, abs=1e-6 * highest)
    assert_same_gradients(ours.gradients, theirs.gradients, LOST_DIGITS.get(case, 1e-5))
    assert_same_weights(ours.weights, theirs.weights)


@pytest.fixture(scope="module")
def undisturbed(teacher: Any, place: Path) -> Callable[..., Trained]:
    """What two processes make of a case, or one; run once."""

    @functools.cache
    def run(case: str, lora: bool, processes: int = 2, micro_batches: int = 1) -> Trained:
        samples = 2 * SHARE["batch_size"] // processes // micro_batches
        share = {"batch_size": samples, "gradient_accumulation_steps": micro_batches}
        out = place / f"{case} {lora} on {processes} by {micro_batches}"
        return trained(out, teacher, case, processes, share, **(LORA if lora else {}))

    return run


def test_every_method_is_shared() -> None:
    assert {method for method, _ in CASES.values()} == set(methods())


@pytest.mark.parametrize(("case", "lora"), EVERY)
def test_two_processes_are_one_with_the_same_samples(
    undisturbed: Callable[..., Trained], case: str, lora: bool
) -> None:
    assert_same(case, undisturbed(case, lora, 1), undisturbed(case, lora))


@pytest.mark.soak
@pytest.mark.parametrize(("case", "lora"), [one for one in EVERY if one.values[0] not in WEIGHED])
def test_micro_batches_are_one_batch(undisturbed: Callable[..., Trained], case: str, lora: bool) -> None:
    assert_same(case, undisturbed(case, lora, 1), undisturbed(case, lora, 1, 2))


@pytest.mark.soak
@pytest.mark.parametrize("case", STAGED)
def test_a_run_of_stages_goes_on_from_every_step_to_the_bit(teacher: Any, place: Path, case: str) -> None:
    """As after a kill in the middle of each of its stages."""
    share = {**SHARE, "checkpointing_steps": 1, "checkpoints_total_limit": 9}
    out = place / f"{case} whole"
    whole = trained(out, teacher, case, 1, share)
    last = RUN["max_steps"]
    for step in range(1, last):
        parts = Path(shutil.copytree(out, place / f"{case} from {step}"))
        for later in range(step + 1, last + 1):
            shutil.rmtree(parts / "checkpoints" / f"step_{later:08d}")
        again = trained(parts, teacher, case, 1, share, resume=True)
        assert all(torch.equal(value, again.weights[name]) for name, value in whole.weights.items()), step


@pytest.mark.parametrize(
    ("first", "then"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.soak), pytest.param(2, 2, marks=pytest.mark.soak)]
)
@pytest.mark.parametrize(("case", "lora"), EVERY)
def test_a_run_goes_on_with_another_number_of_processes(
    teacher: Any,
    place: Path,
    undisturbed: Callable[..., Trained],
    case: str,
    lora: bool,
    first: int,
    then: int,
) -> None:
    """By the same line: the settings that keep a step's samples are found, said, and written down."""
    out, more = place / f"{case} {lora} {first} {then}", LORA if lora else {}
    share = {**SHARE, "batch_size": SHARE["batch_size"] * 2 // first}  # one process does what two do
    # A run of phases or stages is none before the last of them begins.
    trained(out, teacher, case, first, share, **more, max_steps=3 if case in STAGED else 2)
    found = trained(out, teacher, case, then, share, **more, resume=True)
    whole = undisturbed(case, lora)
    assert_same_weights(whole.weights, found.weights)
    assert first != then or all(torch.equal(value, found.weights[name]) for name, value in whole.weights.items())
    settings, said = read_config(out), Path(f"{out}_said/stderr_0.txt").read_text()
    assert settings["batch_size"] * settings["gradient_accumulation_steps"] * then == 2 * SHARE["batch_size"]
    assert ("a step keeps its 4 samples" in said) == (first != then)
