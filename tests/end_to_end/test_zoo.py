"""Any folder of pipelines (--zoo DIR), weights shaken: proven, distilled in full and as a LoRA, and sampled.

Each student is run by stock diffusers in a process in which fewstep cannot be imported; what passed between its network
and its scheduler is then held against the teacher's schedule.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy
import pipeline_folder
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fewstep.cli import main
from fewstep.diffusion.prediction import noise_from_x0, ode_step, to_x0, x0_map
from fewstep.diffusion.schedule import NoiseSchedule, from_scheduler
from fewstep.recording.watch.shake import shaken
from tests.stock_process import run_stock

PAGE = Path(__file__).resolve().parents[2] / "docs" / "pipelines.md"
COUNTS = (1, 2, 4)

STOCK = """
import json, sys
import diffusers, numpy, torch

def first(output):
    output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    return (torch.stack(list(output)) if isinstance(output, (list, tuple)) else output).float().clone()

def run(pipeline, about, condition, count):
    pipeline.set_progress_bar_config(disable=True)
    seen = {"network": [], "timestep": [], "output": [], "sample": [], "next": []}
    network, scheduler = getattr(pipeline, about["component"]), pipeline.scheduler
    handle = network.register_forward_hook(lambda _m, _a, output: seen["network"].append(first(output)))
    step = type(scheduler).step

    def watched(self, model_output, timestep, sample, *args, **kwargs):
        seen["timestep"].append(torch.as_tensor(float(timestep), dtype=torch.float64))
        seen["output"].append(model_output.clone())
        seen["sample"].append(sample.clone())
        result = step(self, model_output, timestep, sample, *args, **kwargs)
        seen["next"].append((result[0] if isinstance(result, tuple) else result.prev_sample).clone())
        return result

    watched.__signature__ = __import__("inspect").signature(step)
    type(scheduler).step = watched
    torch.manual_seed(1)
    call = {**about["call"], **condition, "num_inference_steps": count, "output_type": "np"}
    try:
        pipeline(**call, generator=torch.Generator().manual_seed(0))
    finally:
        type(scheduler).step = step
        handle.remove()
    return {key: torch.stack(values).numpy() for key, values in seen.items()}

def load(student):
    about = json.load(open(student["folder"] + "/fewstep.json"))
    source = student.get("base", student["folder"])
    pipeline = diffusers.DiffusionPipeline.from_pretrained(source, **about["load"])
    if "base" in student:
        if student["lora"]:
            pipeline.load_lora_weights(student["folder"], weight_name=about["lora"]["file"])
        scheduler = getattr(diffusers, about["scheduler"])
        pipeline.scheduler = scheduler.from_pretrained(student["folder"], subfolder="scheduler")
    return pipeline, about

for job in json.loads(sys.argv[1]):
    saved = {}
    for name, student in job["students"].items():
        pipeline, about = load(student)
        for count in about["counts"]:
            for key, value in run(pipeline, about, job["condition"], count).items():
                saved[f"{name} {count} {key}"] = value
    numpy.savez(job["out"], **saved)
"""


@dataclass
class Tried:
    """A pipeline that was tried: what of it is where, and what was printed and seen; or what went wrong."""

    base: Path
    students: dict[str, dict[str, Any]] = field(default_factory=dict)
    condition: dict[str, Any] = field(default_factory=dict)
    probed: str = ""
    seen: dict[str, numpy.ndarray] = field(default_factory=dict)
    failure: str = ""

    def about(self, student: str) -> dict[str, Any]:
        """A student's fewstep.json."""
        return json.loads((Path(self.students[student]["folder"]) / "fewstep.json").read_text())

    def steps(self, student: str, count: int) -> dict[str, Tensor]:
        """What passed in a run of ``count`` steps."""
        prefix = f"{student} {count} "
        return {k.removeprefix(prefix): torch.from_numpy(v) for k, v in self.seen.items() if k.startswith(prefix)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", pipeline_folder.names(metafunc.config, sample=True))


@pytest.fixture(scope="module")
def tried(zoo: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tried]:
    """Every pipeline that is asked for, distilled; all students then sampled in one process without fewstep."""
    results, jobs = {}, []
    for name in dict.fromkeys(item.callspec.params["family"] for item in request.session.items if _asks(item)):
        place = tmp_path_factory.mktemp(name)
        results[name] = result = Tried(place / "base")
        try:
            _try(zoo, name, place, result)
        except Exception as error:  # one family's failure is that family's
            result.failure = repr(error)
            continue
        job = {"out": str(place / "seen.npz"), "condition": result.condition, "students": result.students}
        jobs.append(job)
    run_stock(STOCK, json.dumps(jobs))
    for job in jobs:
        result = next(one for one in results.values() if one.base.parent == Path(job["out"]).parent)
        with numpy.load(job["out"]) as file:
            result.seen = dict(file)
    return results


def _asks(item: Any) -> bool:
    return "tried" in getattr(item, "fixturenames", ()) and item.module.__name__ == __name__


def _try(zoo: Path, name: str, place: Path, result: Tried) -> None:
    pipeline = DiffusionPipeline.from_pretrained(zoo / name)
    call = pipeline_folder.call_of(zoo, name, pipeline)
    with shaken(pipeline_folder.denoiser(pipeline)):
        pipeline.save_pretrained(result.base)
    result.condition = {key: call.pop(key) for key in ("prompt", "class_labels") if key in call}
    call.pop("batch_size", None)
    given = ["--call", json.dumps(call)]
    result.probed = _run(["probe", str(result.base), *given])
    (place / "prompts.txt").write_text("a cat\n", encoding="utf-8")
    chosen = {"prompt": ["--prompts", str(place / "prompts.txt")], "class_labels": ["--classes", "0-2"]}
    common = ["distill", "dmd2", "--teacher", str(result.base), *given, "--steps", "4", "--max_steps", "2", "--cpu"]
    common += ["--batch_size", "1", "--critic_updates", "1", "--lr", "1e-2", "--sample_steps", "0"]
    common += ["--report_to", "none", *next((chosen[key] for key in result.condition), [])]
    fresh = _run([*common, "--out", str(place / "full"), "--renoise", "fresh"], allowed="take --renoise ode")
    if "take --renoise ode" in fresh:
        _run([*common, "--out", str(place / "full"), "--renoise", "ode"])
    lora = ["--out", str(place / "lora"), "--renoise", "ode", "--lora_rank", "4", "--lora_alpha", "8", "--merge"]
    _run([*common, *lora])
    result.students = {"full": {"folder": str(place / "full" / "student")}}
    result.students["merged"] = {"folder": str(place / "lora" / "student")}
    if (folder := place / "lora" / "student_lora").is_dir():
        onto = {"folder": str(folder), "base": str(result.base)}
        result.students |= {"lora": {**onto, "lora": True}, "base": {**onto, "lora": False}}


def _run(words: list[str], allowed: str | None = None) -> str:
    """What a command prints; it must succeed, or fail with a line that holds ``allowed``."""
    said, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        code = main(words)
    line = next((line for line in complained.getvalue().splitlines() if line.startswith("fewstep: ")), "")
    assert code == 0 or (code == 2 and allowed is not None and allowed in line), line
    return said.getvalue() if code == 0 else line


def schedule_of(base: Path) -> NoiseSchedule:
    """The teacher's."""
    name = json.loads((base / "model_index.json").read_text())["scheduler"][1]
    return from_scheduler(getattr(diffusers, name).from_pretrained(base, subfolder="scheduler"))[0]


def assert_walks(schedule: NoiseSchedule, about: dict[str, Any], count: int, seen: dict[str, Tensor]) -> None:
    """Each step leads from x_t to alpha' x0 + sigma' n, with its own noise n or unit noise, and the last one to x0."""
    grid = about["grids"][str(count)]
    times = [schedule.time(timestep.reshape(1)) for timestep in seen["timestep"]]
    assert [float(t) for t in times] == pytest.approx(grid, abs=1e-6) and len(grid) == count
    for k, t in enumerate(times):
        x_t, raw, following = (seen[key][k].double() for key in ("sample", "output", "next"))
        x0 = to_x0(raw, about["prediction_type"], x_t, schedule, t)
        gain = float(x0_map(about["prediction_type"], schedule, t)[1].abs())
        close = 1e-5 * (1 + gain) * max(1.0, float(x_t.abs().max()))
        if k + 1 == count:
            assert (following - x0).abs().max() < close
            continue
        now, then = schedule.coefficients(t), schedule.coefficients(times[k + 1])
        if about["renoise"] == "ode":
            assert (following - ode_step(x_t, x0, now, then)).abs().max() < close
            continue
        fresh, old = noise_from_x0(x0, following, then).flatten(), noise_from_x0(x0, x_t, now).flatten()
        spread = 5 / len(fresh) ** 0.5
        assert abs(float(fresh.mean())) < spread and abs(float(fresh.std()) - 1) < spread
        assert abs(float(torch.corrcoef(torch.stack([fresh, old]))[0, 1])) < spread


def test_students_walk_right_where_fewstep_is_not_installed(tried: dict[str, Tried], family: str) -> None:
    result = tried[family]
    assert not result.failure, result.failure
    assert ("proof" in result.probed and "guided" in result.probed) or "no classifier-free" in result.probed
    schedule = schedule_of(result.base)
    for name in result.students:
        about = result.about(name)
        # With fresh noise, a flow grid under a pipeline that passes only a count is not right at all of them.
        assert set(COUNTS if about["renoise"] == "ode" else COUNTS[-1:]) <= set(about["counts"])
        for count in about["counts"]:
            assert_walks(schedule, about, count, result.steps(name, count))


def test_a_lora_samples_as_the_merged_student(tried: dict[str, Tried], family: str) -> None:
    result = tried[family]
    assert not result.failure, result.failure
    for count in COUNTS:
        merged = result.steps("merged", count)["network"]
        assert merged.shape[0] == count and merged.isfinite().all() and merged.std() > 0
        if "lora" not in result.students:
            continue
        loaded, base = (result.steps(name, count)["network"] for name in ("lora", "base"))
        off = float((loaded - merged).abs().max() / merged.abs().max())
        moved = float((loaded - base).abs().max() / merged.abs().max())
        assert off < 1e-3 and moved > 10 * off, f"{count} steps: {off:.1e} off, moved by {moved:.1e}"


def test_the_page_of_pipelines_says_what_was_seen(zoo: Path, tried: dict[str, Tried], family: str) -> None:
    """The row of a pipeline's class; a folder without a manifest may hold any variant of it."""
    result = tried[family]
    if not (zoo / "manifest.json").is_file():
        pytest.skip("the table of pipelines is about the folder with a manifest")
    assert not result.failure, result.failure
    row = page_row(result)
    rows = re.findall(r"^\| `\w+Pipeline` \|.*\|$", PAGE.read_text(encoding="utf-8"), re.M)
    known = [line for line in rows if line.startswith(row.split(" | ")[0] + " |")]
    assert not known or known[0].rpartition(" | ")[0] == row, row


def page_row(result: Tried) -> str:
    """A row of the table of pipelines, without its last cell."""
    pipeline = json.loads((result.base / "model_index.json").read_text())["_class_name"]
    line = next(line for line in result.probed.splitlines() if line.startswith("guidance "))
    embedded = "embedded; " if "embedded guidance" in line else ""
    if found := re.search(r"off at (\w+)=(\S+); (\d) calls?, (negative|positive)", line):
        name, off, calls, first = found.groups()
        order = "negative first" if first == "negative" else "positive first"
        guidance = f"{embedded}`{name}`, off at {off}, {calls} call{'s' * (calls != '1')}, {order}"
    else:
        guidance = embedded.removesuffix("; ") or "none"
    full, merged = result.about("full"), result.about("merged")
    fresh = f"`{full['scheduler']}`" if full["renoise"] == "fresh" else "no"
    cells = [f"`{pipeline}`", full["conditional"] or "nothing", guidance, f"`{merged['scheduler']}`", fresh]
    return "| " + " | ".join([*cells, "yes" if "lora" in result.students else "merged"])
