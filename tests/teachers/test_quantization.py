"""Adapters on a frozen network in few bits: by libraries where they are there, and by a stand-in that needs none."""

import copy
import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn
from toys import adapter_role

from fewstep.config import run
from fewstep.errors import UserError
from fewstep.export.apply import LORA_FILE, apply
from fewstep.networks.adapters import Backbone, attention_linears
from fewstep.programs.cache import cache
from fewstep.programs.distillation import distill
from fewstep.programs.methods import method_class
from fewstep.programs.pairs import make_pairs
from fewstep.programs.planning.plan import Planner
from fewstep.recording import record
from fewstep.recording.pipeline import is_quantized, is_quantized_layer
from fewstep.recording.watch.shake import shaken
from fewstep.teachers import quantization
from fewstep.teachers.quantization import QUANTIZATIONS, denoiser_classes, pipeline_quantization
from fewstep.teachers.source import Source
from tests.checkpoints import load_latest
from tests.whole_runs import whole_run

RUN = {"steps": 2, "max_steps": 2, "batch_size": 2, "log_steps": 1, "report_to": "none", "cpu": True}
RUN |= {"critic_updates": 1, "lora_rank": 4, "lora_alpha": 8.0, "lr": 1e-2, "sample_steps": 0, "renoise": "ode"}


class RoundedWeight(nn.Parameter):
    """Integers, as libraries hold them: a parameter that cannot be trained and is not its own values."""

    def __new__(cls, data: Tensor) -> "RoundedWeight":
        return torch.Tensor._make_subclass(cls, data, False)

    def __deepcopy__(self, memo: dict) -> "RoundedWeight":
        raise RuntimeError("some libraries' weights cannot be copied")


class RoundedLinear(nn.Linear):
    """A linear layer of 8-bit weights, a scale for each row beside them in an attribute."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = RoundedWeight((layer.weight.detach() / self.scale.clamp_min(1e-9)).round().to(torch.int8))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.detach().as_subclass(Tensor).to(x.dtype)
        return nn.functional.linear(x, weight * self.scale.to(x.dtype), self.bias)


def stand_in(network: nn.Module) -> nn.Module:
    return _replaced(network, RoundedLinear)


def bitsandbytes(network: nn.Module, bits: int) -> nn.Module:
    """As diffusers does it on a GPU; the library's own layers run on a CPU."""
    library = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

    def made(layer: nn.Linear) -> nn.Module:
        sizes = (layer.in_features, layer.out_features, layer.bias is not None)
        if bits == 4:
            new = library.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
            new.support_avx512bf16_for_cpu = False  # a kernel of its own, which tiny layers are too small for
        else:
            new = library.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        new.load_state_dict(layer.state_dict())
        return new.to("cpu").requires_grad_(False)

    network = _replaced(network, made)
    setattr(network, f"is_loaded_in_{bits}bit", True)
    return network


def _replaced(network: nn.Module, made: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, made(child).eval())
    return network


def library_of(name: str) -> None:
    """Skip where a quantisation's library is not installed."""
    if importlib.util.find_spec(QUANTIZATIONS[name].module.partition(".")[0]) is None:
        pytest.skip(f"{QUANTIZATIONS[name].package} is not installed")


#: What a tiny UNet is quantised by, in memory. Those of 8 bits that round activations too have a coarse gradient.
IN_MEMORY = {
    "stand_in": (stand_in, 1e-5),
    "bitsandbytes_4bit": (lambda network: bitsandbytes(network, 4), 1e-5),
    "bitsandbytes_8bit": (lambda network: bitsandbytes(network, 8), 5e-2),
}


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\na small dog\nb\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    pipeline = tiny_pipelines.tiny_stable_diffusion()
    with shaken(pipeline.unet):
        pipeline.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def unpacked(network: nn.Module, plain: nn.Module) -> nn.Module:
    """`plain` with the weights that the layers of `network` have in effect, each asked for what it makes of 1."""
    for path, layer in network.named_modules():
        if is_quantized_layer(layer):
            zero = torch.zeros(1, layer.in_features)
            effective = (layer(torch.eye(layer.in_features)) - layer(zero)).T
            plain.get_submodule(path).weight.data.copy_(effective)
    return plain


@pytest.mark.parametrize("way", IN_MEMORY)
@pytest.mark.parametrize(
    "checkpointing", [pytest.param(False, id="plain", marks=pytest.mark.soak), pytest.param(True, id="checkpointing")]
)
def test_the_gradient_is_that_of_the_unpacked_network(way: str, checkpointing: bool) -> None:
    quantize, close = IN_MEMORY[way]
    pipeline = tiny_pipelines.tiny_stable_diffusion()
    with shaken(pipeline.unet):
        original = copy.deepcopy(pipeline.unet)
    plain = copy.deepcopy(original)
    pipeline.unet = quantize(original)
    recording = record(pipeline)
    recording.prove()
    plain = unpacked(pipeline.unet, plain)
    found = []
    for network in (pipeline.unet, plain):
        backbone = Backbone(network, 3, 5, gradient_checkpointing=checkpointing)
        roles = {name: adapter_role(name, backbone, recording) for name in ("teacher", "student", "critic")}
        x = torch.randn(2, *recording.sample_shape, generator=torch.Generator().manual_seed(0))
        t = torch.full((2,), 0.5, dtype=torch.float64)
        conditioning = recording.condition(prompts=["a", "b"])
        x0 = roles["student"](x, t, conditioning)
        # As in SiD: through teacher and critic into the student.
        loss = (roles["teacher"](x0 + x, t, conditioning) - roles["critic"](x0 - x, t, conditioning)).square().mean()
        loss.backward(inputs=roles["student"].parameters())
        gradients = [parameter.grad.flatten() for parameter in roles["student"].parameters()]
        found.append((x0.detach(), torch.cat(gradients)))
    (x0, gradient), (expected_x0, expected) = found
    assert expected.norm() > 0
    assert (x0 - expected_x0).norm() <= close * expected_x0.norm()
    assert (gradient - expected).norm() <= close * expected.norm()


@pytest.mark.parametrize("way", IN_MEMORY)
def test_a_quantised_pipeline_trains_resumes_and_exports_its_adapter(way: str, prompts: str, tmp_path: Path) -> None:
    quantize, _ = IN_MEMORY[way]
    pipeline = tiny_pipelines.tiny_stable_diffusion()
    with shaken(pipeline.unet):
        base = copy.deepcopy(pipeline.unet)
    pipeline.unet = quantize(copy.deepcopy(base))
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    settings = {**RUN, "prompts": prompts, "checkpointing_steps": 1, "max_steps": 3}
    whole = distill(pipeline, "dmd2", out=str(tmp_path / "whole"), **settings)
    distill(pipeline, "dmd2", out=str(tmp_path / "parts"), **{**settings, "max_steps": 1})
    parts = distill(pipeline, "dmd2", out=str(tmp_path / "parts"), **settings, resume=True)
    one, two = (load_file(folder / LORA_FILE) for folder in (whole, parts))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert any(value.abs().max() > 0 for key, value in one.items() if "lora_B" in key)
    assert {value.dtype for value in one.values()} == {torch.float32}
    assert all(torch.equal(value, before[name]) for name, value in pipeline.unet.state_dict().items())
    other = tiny_pipelines.tiny_stable_diffusion()
    for network in (base, quantize(copy.deepcopy(base))):
        other.unet = network
        student = apply(copy.copy(other), whole)
        assert student("a cat", output_type="np").images.shape[0] == 1
        student.unload_lora_weights()


@pytest.mark.parametrize("name", [name for name in QUANTIZATIONS if not name.startswith("bitsandbytes")])
def test_by_diffusers_own_quantisation(name: str, teacher: Path, prompts: str, tmp_path: Path) -> None:
    library_of(name)
    settings = {**RUN, "prompts": prompts, "quantization": name, "ema_decay": 0.5}
    words = {"teacher": str(teacher), "out": str(tmp_path / "a"), **settings}
    whole = whole_run(method_class("dmd2").Config(**words, merge=True), "dmd2")
    folder, run = whole.folder, whole.bench
    assert is_quantized(run.recording.network) and not is_quantized(run.recording.pipeline.text_encoder)
    lora = load_file(tmp_path / "a" / "student_lora" / LORA_FILE)
    base, merged = (DiffusionPipeline.from_pretrained(path).unet for path in (teacher, folder))
    for path in attention_linears(base):
        product = lora[f"unet.{path}.lora_B.weight"] @ lora[f"unet.{path}.lora_A.weight"]
        expected = base.get_submodule(path).weight + 2.0 * product
        torch.testing.assert_close(merged.get_submodule(path).weight, expected)
    # On the base in full precision, and in the few bits that it was trained on.
    config = pipeline_quantization(name, Source(teacher), torch.float32)
    for words in ({}, {"quantization_config": config}):
        loaded = DiffusionPipeline.from_pretrained(teacher, torch_dtype=torch.float32, **words)
        student = apply(loaded, tmp_path / "a" / "student_lora")
        assert is_quantized(student.unet) == bool(words)
        assert student("a cat", output_type="np").images.shape[0] == 1
    with pytest.raises(UserError, match="--resume: quantization differ"):
        distill(teacher, "dmd2", out=str(tmp_path / "a"), **{**settings, "quantization": None}, resume=True)


def test_half_precision_is_that_of_the_whole_pipeline(teacher: Path, prompts: str, tmp_path: Path) -> None:
    library_of("torchao_int8")
    encoded = cache(teacher, tmp_path / "cache", prompts=prompts, cpu=True)
    settings = {**RUN, "quantization": "torchao_int8", "mixed_precision": "bf16", "gradient_checkpointing": True}
    settings |= {"cache": str(encoded)}
    config = method_class("dmd2").Config(teacher=str(teacher), out=str(tmp_path / "a"), **settings)
    whole = whole_run(config, "dmd2")
    folder, run = whole.folder, whole.bench
    assert {p.dtype for p in run.recording.pipeline.text_encoder.parameters()} == {torch.bfloat16}
    asked: set[torch.dtype] = set()
    run.conditions.select([0]).map_tensors(lambda tensor: asked.add(tensor.dtype) or tensor)
    assert asked == {torch.bfloat16}
    assert {value.dtype for value in load_file(folder / LORA_FILE).values()} == {torch.float32}
    state = load_latest(tmp_path / "a" / "checkpoints")[1]
    assert {value.dtype for value in state["student"].values()} == {torch.float32}
    assert apply(DiffusionPipeline.from_pretrained(teacher), folder)("a", output_type="np").images.shape[0] == 1


def test_what_a_quantised_network_cannot_do_is_refused(
    teacher: Path, prompts: str, tmp_path: Path, monkeypatch
) -> None:
    pipeline = tiny_pipelines.tiny_stable_diffusion()
    pipeline.unet = stand_in(pipeline.unet)

    def refusal(source: object, **changes: object) -> str:
        settings = {**RUN, "prompts": prompts, **changes}
        with pytest.raises(UserError) as refused:
            distill(source, "dmd2", out=str(tmp_path / "run"), **settings)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    for changes in ({"lora_rank": 0, "lora_alpha": None}, {"full_critic": True}):
        assert "the unet is quantised, so that only adapters can be trained" in refusal(pipeline, **changes)
    assert "its weights in full precision are not at hand" in refusal(pipeline, merge=True)
    with pytest.raises(UserError, match="the unet is quantised; make pairs of the teacher in full precision"):
        make_pairs(pipeline, out=str(tmp_path / "pairs"), num=2, prompts=prompts, cpu=True)
    plain = tiny_pipelines.tiny_stable_diffusion()
    monkeypatch.setattr(quantization, "_installed", lambda module: False)
    assert "the unet is loaded already" in refusal(plain, quantization="torchao_int8")
    line = refusal(teacher, quantization="quanto_int8")
    assert line == "--quantization quanto_int8 needs the library optimum-quanto: pip install optimum-quanto"
    assert "must be one of bitsandbytes_4bit, " in refusal(teacher, quantization="int8")
    torchao = {"quantization": "torchao_int8"}
    assert "--quantization belongs to adapters" in refusal(
        teacher, quantization="torchao_int8", lora_rank=0, lora_alpha=None
    )
    assert "--full_critic is a copy" in refusal(teacher, **torchao, full_critic=True)
    assert "--teacher_lora cannot be fused" in refusal(
        teacher, quantization="torchao_int8", teacher_lora="a.safetensors"
    )
    monkeypatch.setattr(quantization, "_installed", lambda module: True)
    if not torch.cuda.is_available():
        assert "on a GPU only" in refusal(teacher, quantization="bitsandbytes_4bit")


def test_a_quantised_network_is_told_no_second_time(prompts: str, tmp_path: Path) -> None:
    pipeline = tiny_pipelines.tiny_stable_diffusion()
    pipeline.unet = stand_in(pipeline.unet)
    settings = {name: value for name, value in RUN.items() if name != "critic_updates"}
    with pytest.raises(UserError, match="the unet is quantised; a student of two times needs it in full precision"):
        distill(pipeline, "mean_flow", out=str(tmp_path / "run"), prompts=prompts, **settings)


def test_the_denoisers_of_a_pipeline_are_known_by_its_index(teacher: Path, tmp_path: Path) -> None:
    index = json.loads((teacher / "model_index.json").read_text(encoding="utf-8"))
    assert list(denoiser_classes(index)) == ["unet"]
    experts = {
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"],
    }
    others = {"vae": ["diffusers", "AutoencoderKLWan"], "tokenizer": [None, None], "boundary_ratio": 0.5}
    assert list(denoiser_classes({**experts, **others})) == ["transformer", "transformer_2"]


@pytest.mark.soak
def test_a_cache_of_the_full_teacher_serves_its_quantised_form_and_no_other(
    teacher: Path, prompts: str, tmp_path: Path
) -> None:
    encoded = cache(teacher, tmp_path / "cache", prompts=prompts, cpu=True)
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    pipeline.unet = stand_in(pipeline.unet)
    settings = {**RUN, "cache": str(encoded)}
    folder = distill(pipeline, "dmd2", out=str(tmp_path / "run"), **settings)
    assert (folder / LORA_FILE).is_file()
    with shaken(pipeline.text_encoder), pytest.raises(UserError, match="its text_encoder differs"):
        distill(pipeline, "dmd2", out=str(tmp_path / "other"), **settings)


@pytest.mark.soak
def test_a_plan_counts_the_bits(teacher: Path) -> None:
    config = method_class("dmd2").Config(teacher=str(teacher), out="", steps=1, max_steps=2, lora_rank=4, cpu=True)
    planner = Planner(config, "dmd2")
    plain, eight = planner.plan(), planner.plan(quantization="bitsandbytes_8bit")
    half = planner.plan(quantization="bitsandbytes_4bit", mixed_precision="bf16")
    layers = [module for module in planner.recording.network.modules() if type(module) is nn.Linear]
    weights = sum(m.in_features * m.out_features for m in layers)
    rows, groups = sum(m.out_features for m in layers), sum(-(-m.in_features * m.out_features // 64) for m in layers)
    assert plain.kept - eight.kept == 4 * weights - (weights + 4 * rows)
    assert half.kept == (plain.kept - 4 * weights) // 2 + weights // 2 + 4 * groups
    assert half.roles == eight.roles == plain.roles and plain.parameters == eight.parameters
    assert half.peak < eight.peak < plain.peak and half.settings.startswith("LoRA of rank 4 on bitsandbytes_4bit")


def test_the_settings_know_every_way_to_quantise() -> None:
    assert tuple(QUANTIZATIONS) == run.QUANTIZATIONS
