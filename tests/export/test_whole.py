"""Exported folders: stock diffusers samples them right, in a process that knows no fewstep."""

import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from tiny_pipelines import TINY, tiny_stable_diffusion

import fewstep
from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.export import ExportError, export_student, load, plan_student, whole
from fewstep.export.about import read_about
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.recording import record
from tests.stock_process import run_stock

_STOCK = """
import json, sys
import numpy as np
import torch
from diffusers import DiffusionPipeline

for folder, subject, out in json.loads(sys.argv[1]):
    about = json.load(open(folder + "/fewstep.json"))
    pipe = DiffusionPipeline.from_pretrained(folder, **about["load"])
    pipe.set_progress_bar_config(disable=True)
    images = {}
    for count in about["counts"]:
        torch.manual_seed(1)
        call = {**about["call"], "num_inference_steps": count}
        result = pipe(**subject, **call, generator=torch.Generator().manual_seed(0), output_type="np")
        images[str(count)] = np.asarray(result[0])
    np.savez(out, **images)
"""


def export(recording, network, out, steps=4, renoise="auto", **more):
    plan = plan_student(recording, steps, renoise=renoise)
    more = {"method": "dmd2", "base_model": "example/teacher", **more}
    return plan, export_student(recording, network, plan, out, **more)


def own_images(recording, network, plan, subject, count):
    """The trainer's own rollout under the noise that the pipeline draws, as images (B, H, W, C) in [0, 1]."""
    denoiser = NetworkDenoiser(network, recording.recipe, recording.schedule, recording.prediction_type)
    sampler = Sampler(recording.schedule, plan.grids[count], plan.renoise, plan.initial_scale)
    generator = torch.Generator().manual_seed(0)
    shape = (1, *recording.sample_shape)
    noise = torch.randn(shape, generator=generator)
    steps = torch.Generator().manual_seed(1) if plan.noise_follows == "global seed" else generator
    names = {"prompt": "prompts", "class_labels": "labels"}
    items = {names[key]: [value] if isinstance(value, str) else value for key, value in subject.items()}
    conditioning = recording.condition(**items)
    with torch.no_grad():
        x0 = rollout(denoiser, sampler, noise, conditioning, step_noise=lambda _: torch.randn(shape, generator=steps))
    return recording.decode(x0).permute(0, 2, 3, 1).numpy()


def test_stock_diffusers_gives_the_trainers_images(recorded, trained, subject, tmp_path):
    made = {}
    for name in TINY:
        for renoise in ("ode", "fresh"):
            if renoise == "fresh" and name in ("ddim", "edm"):
                continue
            recording = recorded(name)
            network = trained(recording)
            plan, folder = export(recording, network, tmp_path / f"{name}-{renoise}", renoise=renoise)
            made[name, renoise] = recording, network, plan, folder
    job = [
        [str(folder), subject(recording), str(tmp_path / f"{name}-{renoise}.npz")]
        for (name, renoise), (recording, _, _, folder) in made.items()
    ]
    run_stock(_STOCK, json.dumps(job))
    for (name, renoise), (recording, network, plan, _) in made.items():
        stock = np.load(tmp_path / f"{name}-{renoise}.npz")
        assert sorted(map(int, stock.files)) == list(plan.counts)
        assert 1 in plan.counts or (name, renoise) == ("flow", "fresh")
        for count in plan.counts:
            own = own_images(recording, network, plan, subject(recording), count)
            assert np.abs(stock[str(count)] - own).max() < 1 / 255, (name, renoise, count)
            assert own.std() > 0.01  # a blank image equals any other


def test_folder_describes_itself(recorded, trained, tmp_path):
    plan, folder = export(recorded("stable_diffusion"), trained(recorded("stable_diffusion")), tmp_path / "student")
    about = json.loads((folder / "fewstep.json").read_text())
    assert about["method"] == "dmd2"
    assert about["base_model"] == "example/teacher"
    assert about["fewstep_version"] == fewstep.__version__
    assert about["timesteps"] == [999, 749, 499, 249]
    assert about["call"] == {"num_inference_steps": 4, "guidance_scale": 1.0}
    assert about["counts"] == list(plan.counts)
    assert {"steps", "grid", "renoise", "prediction_type", "conditional"} <= set(about)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["scheduler"] == ["diffusers", "LCMScheduler"]
    assert list((folder / "unet").glob("*.safetensors"))
    assert not list(folder.rglob("*.bin"))
    stock = DiffusionPipeline.from_pretrained(folder).scheduler
    stock.set_timesteps(4)
    assert stock.timesteps.tolist() == about["timesteps"]


def test_nothing_of_this_machine_is_published(trained, tmp_path):
    teacher = tmp_path / "secret" / "my-teacher"
    tiny_stable_diffusion().save_pretrained(teacher)
    recording = record(DiffusionPipeline.from_pretrained(teacher), prompt="the cat")
    _, folder = export(recording, trained(recording), tmp_path / "student", base_model=str(teacher))
    texts = [path.read_text() for suffix in ("*.json", "*.md") for path in folder.rglob(suffix)]
    assert not any("secret" in text for text in texts)
    assert json.loads((folder / "fewstep.json").read_text())["base_model"] == "my-teacher"


def test_card(recorded, trained, tmp_path):
    metrics = {"teacher, 25 steps": {"fd": 10.5}, "student, 4 steps": {"fd": 9.25, "agreement": 0.9}}
    recording = recorded("dit")
    _, folder = export(
        recording, trained(recording), tmp_path / "s", renoise="fresh", metrics=metrics, teacher_license="mit"
    )
    card = (folder / "README.md").read_text()
    from huggingface_hub.repocard import metadata_load

    front = metadata_load(folder / "README.md")
    assert front["base_model"] == "example/teacher"
    assert front["license"] == "mit"
    assert front["library_name"] == "diffusers"
    assert {"fewstep", "few-step", "dmd2"} <= set(front["tags"])
    assert "| student, 4 steps | 9.25 | 0.9 |" in card
    assert "pipe.scheduler.step = functools.partial(pipe.scheduler.step, generator=generator)" in card


@pytest.mark.parametrize(
    ("name", "renoise"),
    [("stable_diffusion", "fresh"), ("dit", "fresh"), ("flow", "fresh"), ("ddim", "ode"), ("flow", "ode")],
)
def test_the_code_on_the_card_runs_and_agrees(recorded, trained, tmp_path, name, renoise):
    recording = recorded(name)
    _, folder = export(recording, trained(recording), tmp_path / "s", steps=2, renoise=renoise)
    images = []
    for code in re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S):
        code = code.replace("path/to/this/folder", str(folder))
        if "fewstep" in code:  # the short form leaves the seeds to the reader
            seeded = ", generator=torch.Generator().manual_seed(0)).images"
            code = "import torch\n" + code.replace(").images", seeded).replace("(, ", "(")
        scope = {}
        exec(code, scope)
        images.append(np.asarray(scope["image"]))
    assert len(images) == 2
    assert np.array_equal(*images)


def test_licence_is_read_from_the_teachers_own_card(trained, tmp_path):
    teacher = tmp_path / "teacher"
    tiny_stable_diffusion().save_pretrained(teacher)
    (teacher / "README.md").write_text(
        "---\nlicense: other\nlicense_name: open-thing\nlicense_link: LICENSE.md\n---\nhi\n"
    )
    recording = record(DiffusionPipeline.from_pretrained(teacher), prompt="the cat")
    _, folder = export(recording, trained(recording), tmp_path / "student", steps=1, base_model="example/teacher")
    card = (folder / "README.md").read_text()
    assert 'license_name: "open-thing"' in card


def test_the_teacher_stays_as_it_was(recorded, trained, tmp_path):
    recording = recorded("flow")
    before = dict(recording.pipeline.config), recording.pipeline.scheduler, recording.pipeline.transformer
    export(recording, trained(recording), tmp_path / "student", steps=1)
    after = dict(recording.pipeline.config), recording.pipeline.scheduler, recording.pipeline.transformer
    assert before[0] == after[0]
    assert before[1] is after[1] and before[2] is after[2]


def test_a_student_of_another_dtype_is_saved_in_the_teachers(trained, tmp_path):
    recording = record(tiny_stable_diffusion().to(dtype=torch.bfloat16), prompt="the cat")
    network = trained(recording).float()
    _, folder = export(recording, network, tmp_path / "student", steps=2)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert pipeline.unet.dtype == torch.bfloat16
    assert next(network.parameters()).dtype == torch.float32


def test_crash_leaves_no_half_student(recorded, trained, tmp_path, monkeypatch):
    recording = recorded("ddim")
    _, folder = export(recording, trained(recording), tmp_path / "student", steps=1)
    first = (folder / "fewstep.json").read_text()

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(whole, "write_card", full)
    with pytest.raises(OSError, match="No space"):
        export(recording, trained(recording), folder, steps=2)
    assert (folder / "fewstep.json").read_text() == first
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    monkeypatch.undo()
    export(recording, trained(recording), folder, steps=2)  # an older student is replaced
    assert json.loads((folder / "fewstep.json").read_text())["steps"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_student_that_walks_wrong_is_not_left_behind(recorded, trained, tmp_path):
    recording = recorded("stable_diffusion")
    plan = plan_student(recording, 2, renoise="ode")
    betas = plan.scheduler.config.trained_betas
    plan.scheduler.register_to_config(trained_betas=[beta * 1.05 for beta in betas])
    with pytest.raises(ExportError, match="is not x0"):
        export_student(recording, trained(recording), plan, tmp_path / "s", method="dmd2", base_model="example/teacher")
    assert not list(tmp_path.iterdir())
    assert isinstance(plan.scheduler, DDIMScheduler)


def test_other_peoples_folders_are_not_overwritten(recorded, trained, tmp_path):
    recording = recorded("ddim")
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ExportError, match="something else"):
        export(recording, trained(recording), tmp_path, steps=1)
    with pytest.raises(ExportError, match="is a file"):
        export(recording, trained(recording), tmp_path / "thesis.tex", steps=1)
    with pytest.raises(ExportError, match="do not fit"):
        export(recording, recorded("dit").network, tmp_path / "new", steps=1)


def test_load_fills_the_call_in(recorded, trained, subject, tmp_path):
    recording = recorded("stable_diffusion")
    _, folder = export(recording, trained(recording), tmp_path / "student", steps=2)
    loaded, stock = load(folder), DiffusionPipeline.from_pretrained(str(folder))
    loaded.set_progress_bar_config(disable=True)
    stock.set_progress_bar_config(disable=True)
    assert isinstance(loaded, StableDiffusionPipeline)
    assert type(loaded) is not StableDiffusionPipeline

    def image(pipeline, *args, **kwargs):
        return pipeline(*args, **kwargs, generator=torch.Generator().manual_seed(0), output_type="np").images

    call = loaded.fewstep["call"]
    assert np.array_equal(image(loaded, "the cat"), image(stock, "the cat", **call))
    assert np.array_equal(image(loaded, prompt="the cat"), image(stock, "the cat", **call))
    # What is given wins, also by position (height, width, num_inference_steps).
    one = image(stock, "the cat", guidance_scale=1.0, num_inference_steps=1)
    assert np.array_equal(image(loaded, "the cat", num_inference_steps=1), one)
    assert np.array_equal(image(loaded, "the cat", None, None, 1), one)
    guided = image(loaded, "the cat", guidance_scale=7.0)
    assert not np.array_equal(guided, image(loaded, "the cat"))
    assert inspect.signature(loaded.__call__) == inspect.signature(stock.__call__)


def test_load_warns_of_counts_that_do_not_hold(recorded, trained, tmp_path):
    recording = recorded("ddim")
    _, folder = export(recording, trained(recording), tmp_path / "student", steps=4)
    pipeline = load(folder)
    pipeline.set_progress_bar_config(disable=True)
    with pytest.warns(UserWarning, match="1, 2, 4 steps, not at 3"):
        pipeline(num_inference_steps=3)


def test_what_load_saves_names_the_stock_class(recorded, trained, tmp_path):
    recording = recorded("stable_diffusion")
    _, folder = export(recording, trained(recording), tmp_path / "student", steps=2)
    again = tmp_path / "again"
    load(folder, torch_dtype=torch.float32).save_pretrained(again)
    assert json.loads((again / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    assert type(DiffusionPipeline.from_pretrained(again)) is StableDiffusionPipeline
    assert load(again).fewstep == load(folder).fewstep


def test_a_hub_id_fetches_one_file(tmp_path, monkeypatch):
    asked = {}

    def fetch(repository, name, **more):
        asked.update(repository=repository, name=name, **more)
        (tmp_path / name).write_text('{"call": {"num_inference_steps": 2}}')
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    assert read_about("owner/name", revision="v1")["call"] == {"num_inference_steps": 2}
    assert asked == {"repository": "owner/name", "name": "fewstep.json", "revision": "v1"}


def test_every_file_of_a_lora_is_fetched_in_the_same_state(tmp_path, monkeypatch):
    asked = []

    def fetch(repository, name, **more):
        asked.append((name, more))
        (tmp_path / name).write_text(
            '{"call": {}, "component": "unet", "base_model": "me/base", "lora": {"file": "a"}}'
        )
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    words = {"revision": "v1", "token": "secret", "cache_dir": "elsewhere"}
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: tiny_stable_diffusion())
    with pytest.raises(ExportError, match="cannot be read"):  # the file that stands for the adapter is none
        load("me/lora", **words)
    assert asked == [("fewstep.json", words), ("fewstep.json", words), ("a", words)]


def test_load_errors_are_one_line(tmp_path):
    def message(what):
        with pytest.raises(ExportError) as caught:
            load(what)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no folder" in message(tmp_path / "nowhere")
    for name in ("some/where/else", "./missing", "../missing", "a/b-"):
        assert "no folder" in message(name)
    assert "hub" in message("owner/name")  # offline
    assert "model_index.json" in message(tmp_path)
    tiny_stable_diffusion().save_pretrained(tmp_path)
    assert "not a fewstep student" in message(tmp_path)
    (tmp_path / "fewstep.json").write_text('{"call": ')
    assert "damaged" in message(tmp_path)
    (tmp_path / "fewstep.json").write_text('{"call": {}}')
    (tmp_path / "unet" / "config.json").unlink()
    assert "does not load" in message(str(tmp_path))
    assert Path(tmp_path).is_dir()
