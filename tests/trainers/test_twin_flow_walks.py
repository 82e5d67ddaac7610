"""TwinFlow's samplers few, any and mul: the paper's walk, as stock diffusers makes it from a student's folder."""

import json

import numpy
import pytest
import torch
from tiny_pipelines import tiny_flow, tiny_stable_diffusion
from torch import Tensor

from fewstep.diffusion.timesteps import WalkTimes
from fewstep.errors import UserError
from fewstep.export.own_code import is_own_code
from fewstep.networks.flow_map import FlowMapDenoiser
from fewstep.networks.twin import TwinDenoiser
from fewstep.recording.watch.shake import shaken
from fewstep.trainers.twin_flow import TwinFlowConfig
from tests.stock_process import run_stock
from tests.trainers.test_twin_flow_runs import FLOW_CALL, RUN
from tests.trainers.toy_twin_flow import config
from tests.whole_runs import WholeRun, whole_run

#: By name: the teacher, its network, settings, and the scheduler that the student is shipped with.
WALKS: dict[str, tuple] = {
    "few": (tiny_flow, "transformer", {"sampler": "few"}, "FlowMatchEulerDiscreteScheduler"),
    "mul": (tiny_flow, "transformer", {"sampler": "mul"}, "WarpedFlowScheduler"),
    "few of a table": (tiny_stable_diffusion, "unet", {"sampler": "few", "steps": 2}, "LCMScheduler"),
}
#: Of the walks of flow students, by count of steps (specification, 5.6; few starts at pure noise in the place of .999).
TIMES = {"few": {2: [1, 0.5], 3: [1, 0.75, 0.5]}, "mul": {}}

_STOCK = """
import json, sys
import diffusers, numpy, torch
out, *folders = sys.argv[1:]
saved = {}
for folder in folders:
    about = json.load(open(f"{folder}/fewstep.json"))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **about["load"], trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    for count in about["counts"]:
        torch.manual_seed(1)  # where a pipeline keeps its generator to itself, its scheduler draws from this one
        call = {**about["call"], "prompt": "a cat", "num_inference_steps": count, "output_type": "latent"}
        found = pipeline(**call, generator=torch.Generator().manual_seed(5))
        saved[f"{folder} {count}"] = found[0].float().numpy()
numpy.savez(out, **saved)
"""


def unified_times(count: int) -> list[float]:
    """mul: gaps (.001, 0) and warps (1.17, .8, 1.1)."""
    u = torch.linspace(0.001, 1, count + 1, dtype=torch.float64)[:-1]
    return (1 - (1 - (1 - u**1.17) ** 0.8) ** 1.1).tolist()


@torch.no_grad()
def paper_walk(run: WholeRun, sampler: str, times: list[float]) -> Tensor:
    """x' = (1 - t') x0 + t' (sqrt(1 - rho) noise + sqrt(rho) fresh), with r by the sampler; in flow's coordinates."""
    bench, plan = run.bench, run.bench.student.plan
    denoiser = run.role.denoiser
    assert isinstance(denoiser, FlowMapDenoiser)
    network = TwinDenoiser(denoiser, 0.0, 1.0)
    shape, first = (1, *bench.recording.sample_shape), torch.Generator().manual_seed(5)
    later = torch.Generator().manual_seed(1) if plan.noise_follows == "global seed" else first
    alpha, sigma = (float(c) for c in bench.sampler.schedule.coefficients(torch.tensor([plan.grid[0]]).double()))
    y, told = plan.initial_scale / (alpha + sigma) * torch.randn(shape, generator=first), bench.conditions.select([0])
    for t, following in zip(times, [*times[1:], 0.0], strict=True):
        r = {"any": following, "few": 0.0, "mul": t}[sampler]
        velocity = network(y, torch.tensor([t]).double(), torch.tensor([r]).double(), told)
        clean, noise = y - t * velocity, y + (1 - t) * velocity
        if sampler == "few" and following > 0:
            noise = torch.randn(shape, generator=later)
        y = (1 - following) * clean + following * noise
    return y


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, WholeRun]:
    """A student of each walk, whose second time says something."""
    place, found = tmp_path_factory.mktemp("walks"), {}
    (place / "prompts.txt").write_text("a cat\na dog\n")
    for name, (builder, network, settings, _) in WALKS.items():
        pipeline, call = builder(), {"call": FLOW_CALL} if builder is tiny_flow else {}
        told = {"prompts": str(place / "prompts.txt"), "teacher": name, "out": str(place / name.replace(" ", "_"))}
        short = {"max_steps": 2, "image_free": True, "lr": 3e-2, "steps": 3}
        with shaken(pipeline.components[network]):
            found[name] = whole_run(
                TwinFlowConfig(**{**RUN, **told, **call, **short, **settings}), "twin_flow", pipeline
            )
    return found


@pytest.fixture(scope="module")
def sampled(runs: dict[str, WholeRun], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, Tensor]]:
    """What a process without this package samples at every count."""
    out = tmp_path_factory.mktemp("sampled") / "x.npz"
    run_stock(_STOCK, str(out), *(str(run.folder) for run in runs.values()))
    with numpy.load(out) as file:
        return {
            name: {
                int(key.rsplit(" ", 1)[1]): torch.from_numpy(file[key])
                for key in file
                if key.rsplit(" ", 1)[0] == str(run.folder)
            }
            for name, run in runs.items()
        }


@pytest.mark.parametrize("name", WALKS)
def test_a_students_folder_makes_the_papers_walk(name: str, runs: dict[str, WholeRun], sampled: dict):
    run, (sampler, *_), scheduler = runs[name], name.split(), WALKS[name][3]
    plan, about = run.bench.student.plan, json.loads((run.folder / "fewstep.json").read_text())
    assert type(plan.scheduler).__name__ == scheduler and about["counts"] == sorted(sampled[name])
    assert {2, run.bench.config.steps} <= {*about["counts"]} and is_own_code(run.folder)
    for count, found in sampled[name].items():
        times = [float(time) for time in plan.grids[count]]
        if name in TIMES:
            golden = TIMES[name].get(count, unified_times(count))
            torch.testing.assert_close(torch.tensor(times), torch.tensor(golden).float(), rtol=0, atol=2e-6)
        times = run.bench.sampler.schedule.flow_time(torch.tensor(times, dtype=torch.float64)).tolist()
        expected = paper_walk(run, sampler, times)
        scale = float(expected.abs().max())
        torch.testing.assert_close(found, expected.reshape(found.shape), rtol=1e-3, atol=2e-3 * scale)
        # Told as another sampler has it, the network says something else.
        other = paper_walk(run, "any", times)
        assert count == 1 or float((other - expected).abs().max()) > 0.02 * scale


def test_times_are_the_papers():
    assert WalkTimes(0.999, 0.6).grid(2).tolist() == pytest.approx([0.999, 0.6])
    assert WalkTimes(0.999, 0.5).grid(4).tolist() == pytest.approx([0.999, 0.8326667, 0.6663333, 0.5])
    found = TwinFlowConfig(teacher="t", out="o", steps=2, sampler="few", image_free=True).walk_times
    assert found is not None and found.grid(2).tolist() == pytest.approx([1, 0.6])
    thirty = WalkTimes(0.999, 0.0, (1.17, 0.8, 1.1)).grid(30).tolist()
    assert thirty == pytest.approx(unified_times(30)) and len(thirty) == 30


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "heun"}, "--sampler must be one of any, few, mul"),
        ({"sampler": "any", "renoise": "fresh"}, "--renoise follows from --sampler any"),
        ({"sampler": "mul", "last_time": 0.5}, "--last_time is of --sampler few"),
        ({"sampler": "few", "steps": 1, "last_time": 0.5}, "--last_time is of --sampler few with two steps"),
        ({"sampler": "few", "shift": 2.0, "last_time": 0.5}, "without a shift"),
        ({"sampler": "few", "last_time": 1.0}, "between 0 and 1"),
    ],
)
def test_walks_that_cannot_be_meant_are_refused(settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        config(**settings)
