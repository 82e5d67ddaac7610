"""The export of a LoRA is tried with the untrained adapter, before anything is trained."""

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import pipeline_folder
import pytest
import tiny_pipelines
from diffusers import DiffusionPipeline, FluxPipeline
from safetensors.torch import load_file

from fewstep.errors import UserError
from fewstep.export.apply import LORA_FILE, apply
from fewstep.export.lora import rehearse_lora
from fewstep.programs.distillation import distill, prepare
from fewstep.programs.methods import method_class
from fewstep.programs.workbench import open_workbench
from fewstep.recording.watch.shake import shaken
from fewstep.teachers.quantization import QUANTIZATIONS, pipeline_quantization
from fewstep.teachers.source import Source

RUN = {"steps": 2, "max_steps": 2, "batch_size": 1, "log_steps": 1, "report_to": "none", "cpu": True, "renoise": "ode"}
RUN |= {"critic_updates": 1, "lora_rank": 4, "lora_alpha": 8.0, "lr": 1e-2, "sample_steps": 0}

#: What is tried in the normal suite; a pair of each other family and kind takes seconds, and is of `make soak`.
QUICK = {("Flux", "quanto_int8"), ("StableDiffusion", None)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" not in metafunc.fixturenames:
        return
    names = pipeline_folder.names(metafunc.config, sample=False, short=False)
    kinds = [None, *(name for name in QUANTIZATIONS if not name.startswith("bitsandbytes"))]
    pairs = [(name, kind) for name in names if isinstance(name, str) for kind in kinds]
    marks = {pair: () if pair in QUICK else pytest.mark.soak for pair in pairs}
    skipped = [pytest.param("none", None, marks=pytest.mark.skip(reason="no folder of tiny pipelines: give --zoo DIR"))]
    cases = [pytest.param(*pair, marks=mark, id="-".join(map(str, pair))) for pair, mark in marks.items()]
    metafunc.parametrize(("family", "quantization"), cases or skipped)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\na small dog\nb\n", encoding="utf-8")
    return str(path)


def test_a_student_that_diffusers_would_not_load_is_not_trained(prompts: str, tmp_path: Path, monkeypatch) -> None:
    """What Flux did with optimum-quanto: its loader looks for weights by names that are not there."""

    def fail(self, *args: Any, **kwargs: Any) -> None:
        raise KeyError("x_embedder.weight")

    pipeline = tiny_pipelines.tiny_flow()
    monkeypatch.setattr(type(pipeline), "load_lora_weights", fail)
    folder = tmp_path / "run"
    with pytest.raises(UserError) as refused:
        distill(pipeline, "dmd2", out=str(folder), prompts=prompts, call={"max_sequence_length": 8}, **RUN)
    assert "diffusers does not load a LoRA student of this" in str(refused.value) and "KeyError" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (folder / "checkpoints").exists() and not (folder / "metrics.jsonl").exists()


def test_a_rehearsal_calls_no_network_and_leaves_nothing(prompts: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    pipeline = tiny_pipelines.tiny_stable_diffusion()
    config = method_class("dmd2").Config(teacher="t", out=str(tmp_path / "run"), prompts=prompts, **RUN)
    bench = open_workbench(config, "cpu", pipeline)
    role = prepare(bench, "dmd2").roles["student"]
    before = {key: value.clone() for key, value in role.state_dict().items()}
    names = set(pipeline.unet.state_dict())
    calls: list[int] = []
    pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    rehearse_lora(bench.recording, role, bench.student.plan)
    assert not calls and not list((tmp_path / "temporary").iterdir()) and not (tmp_path / "run").exists()
    assert set(pipeline.unet.state_dict()) == names
    assert all(bool((value == before[key]).all()) for key, value in role.state_dict().items())


def test_every_family_and_quantisation_trains_to_a_lora_that_goes_onto_its_base(
    zoo: Path, family: str, quantization: str | None, tmp_path: Path
) -> None:
    if quantization is not None and importlib.util.find_spec(QUANTIZATIONS[quantization].module.split(".")[0]) is None:
        pytest.skip(f"{QUANTIZATIONS[quantization].package} is not installed")
    teacher = DiffusionPipeline.from_pretrained(zoo / family)
    network = pipeline_folder.denoiser(teacher)
    if not hasattr(network, "load_lora_adapter"):
        pytest.skip(f"diffusers loads no LoRA into a {type(network).__name__}")
    call = pipeline_folder.call_of(zoo, family, teacher)
    condition = {"prompt": call.pop("prompt")}
    (tmp_path / "prompts.txt").write_text("a cat\n", encoding="utf-8")
    settings = {**RUN, "prompts": str(tmp_path / "prompts.txt"), "call": call, "quantization": quantization}
    base_folder = tmp_path / "base"
    with shaken(network):  # some tiny networks answer zero, and learn nothing
        teacher.save_pretrained(base_folder)
    folder = distill(base_folder, "dmd2", out=str(tmp_path / "run"), **settings)
    assert any(value.abs().max() > 0 for key, value in load_file(folder / LORA_FILE).items() if "lora_B" in key)
    words: dict[str, Any] = {}
    if quantization is not None:
        words["quantization_config"] = pipeline_quantization(quantization, Source(base_folder), teacher.dtype)
    for more in ({}, words) if words else ({},):
        base = DiffusionPipeline.from_pretrained(base_folder, torch_dtype=teacher.dtype, **more)
        if more:
            with pytest.raises(UserError, match="its weights are quantised"):
                apply(base, folder, fuse=True)
        student = apply(base, folder)
        assert student(**condition, output_type="np") is not None
        assert json.loads((folder / "fewstep.json").read_text()) == student.fewstep


def test_the_loader_of_flux_still_fails_on_weights_of_quanto(zoo: Path, tmp_path: Path) -> None:
    """What the card says of it; where it does not any more, the card and :func:`ship` may be simpler."""
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    folder = distill(str(zoo / "Flux"), "dmd2", out=str(tmp_path / "run"), **flux(zoo, tmp_path))
    dtype = DiffusionPipeline.from_pretrained(zoo / "Flux").dtype
    config = pipeline_quantization("quanto_int8", Source(zoo / "Flux"), dtype)
    base = FluxPipeline.from_pretrained(zoo / "Flux", quantization_config=config)
    with pytest.raises(KeyError):
        base.load_lora_weights(str(folder), weight_name=LORA_FILE, adapter_name="student")
    base = FluxPipeline.from_pretrained(zoo / "Flux", quantization_config=config)
    base.transformer.load_lora_adapter(str(folder), weight_name=LORA_FILE, adapter_name="student", prefix="transformer")


def flux(zoo: Path, tmp_path: Path) -> dict[str, Any]:
    call = pipeline_folder.call_of(zoo, "Flux", None)
    call.pop("prompt")
    (tmp_path / "prompts.txt").write_text("a cat\n", encoding="utf-8")
    return {**RUN, "prompts": str(tmp_path / "prompts.txt"), "call": call}
