"""NASA: the attention in closed form, off to the bit, students of several families, files that run stock."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention, AttnProcessor, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttention
from tiny_pipelines import tiny_dit, tiny_stable_diffusion
from torch import Tensor

import fewstep
from fewstep.cli import main
from fewstep.errors import UserError
from fewstep.export import export_student, load, plan_student
from fewstep.export.own_code import is_own_code
from fewstep.pipelines.nasa import Steering, around, first_call, steering_of
from tests.pipeline_folder import call_of, names
from tests.stock_process import run_stock

B, N, OWN, AWAY, DIM, HEADS = 2, 7, 3, 4, 8, 2


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention by its definition; (B, H, tokens, D) each, ``mask`` added to the logits."""
    logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return (logits if mask is None else logits + mask).softmax(-1) @ value


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


# --- the attention ----------------------------------------------------------------------------------------------------


def steering(scale: float, **known: int) -> Steering:
    return Steering(scale, **{"own": OWN, "away": AWAY, **known})


@pytest.mark.parametrize("scale", [0.0, 0.4, 1.5])
@pytest.mark.parametrize("masked", [False, True])
def test_cross_attention_is_two_attentions_before_the_output_projection(scale: float, masked: bool):
    layer = Attention(DIM, cross_attention_dim=6, heads=HEADS, dim_head=4, bias=True).double()
    x, own, away = (torch.randn(B, n, d).double() for n, d in ((N, DIM), (OWN, 6), (AWAY, 6)))
    mask = torch.zeros(B, 1, OWN + AWAY).double()
    if masked:
        mask[:, :, [1, OWN + 2]] = -1e4
    expected = []
    for text, hidden in ((own, mask[..., :OWN]), (away, mask[..., OWN:])):
        key, value = heads(layer.to_k(text)), heads(layer.to_v(text))
        expected.append(merged(attend(heads(layer.to_q(x)), key, value, hidden[:, None])))
    closed = layer.to_out[0](expected[0] - scale * expected[1])
    plain = layer(x, own, attention_mask=mask[..., :OWN] if masked else None)
    layer.set_processor(around(layer.processor, steering(scale)))
    ours = layer(x, torch.cat([own, away], 1), attention_mask=mask if masked else None)
    torch.testing.assert_close(ours, closed, rtol=1e-10, atol=1e-10)
    assert torch.allclose(ours, plain) == (scale == 0)


def test_a_prompt_that_is_its_own_negative_is_scaled_by_one_minus_scale():
    layer = Attention(DIM, cross_attention_dim=6, heads=HEADS, dim_head=4, bias=False, out_bias=False)
    x, text = torch.randn(B, N, DIM), torch.randn(B, OWN, 6)
    plain = layer(x, text)
    layer.set_processor(around(layer.processor, steering(0.3, away=OWN)))
    torch.testing.assert_close(layer(x, torch.cat([text, text], 1)), 0.7 * plain)


def joint(text_first: bool) -> tuple[torch.nn.Module, dict[str, tuple[Tensor, Tensor, Tensor]], tuple[Tensor, ...]]:
    """A layer in which picture and text attend jointly, its tokens' queries, keys and values, and its inputs."""
    if text_first:
        layer = FluxAttention(DIM, heads=HEADS, dim_head=4, added_kv_proj_dim=DIM, bias=True)
        normed = (layer.norm_q, layer.norm_k, layer.norm_added_q, layer.norm_added_k)
    else:
        words = {"added_kv_proj_dim": DIM, "context_pre_only": False, "bias": True}
        layer = Attention(DIM, None, heads=HEADS, dim_head=4, processor=JointAttnProcessor2_0(), **words)
        normed = (torch.nn.Identity(),) * 4
    layer.double()
    inputs = tuple(torch.randn(B, n, DIM).double() for n in (N, OWN, AWAY))
    tokens = {}
    for name, x in zip(("picture", "own", "away"), inputs, strict=True):
        of_picture = name == "picture"
        made = (
            (layer.to_q, layer.to_k, layer.to_v)
            if of_picture
            else (layer.add_q_proj, layer.add_k_proj, layer.add_v_proj)
        )
        query, key, value = (heads(project(x)) for project in made)
        norm_q, norm_k = normed[:2] if of_picture else normed[2:]
        tokens[name] = norm_q(query), norm_k(key), value
    return layer, tokens, inputs


@pytest.mark.parametrize("scale", [0.0, 0.5])
@pytest.mark.parametrize("text_first", [False, True])
def test_joint_attention_subtracts_the_part_of_the_text_alone(scale: float, text_first: bool):
    layer, tokens, (x, own, away) = joint(text_first)

    def among(asking: str, *seen: str, without: str = "") -> Tensor:
        keys = torch.cat([tokens[name][1] for name in seen], -2)
        values = torch.cat([tokens[name][2] * (name != without) for name in seen], -2)
        return merged(attend(tokens[asking][0], keys, values))

    seen = among("picture", "picture", "own") - scale * among("picture", "picture", "away", without="picture")
    closed = layer.to_out[0](seen), layer.to_add_out(among("own", "picture", "own"))
    negative = layer.to_add_out(among("away", "picture", "away"))
    layer.set_processor(around(layer.processor, steering(scale, text_first=text_first)))
    picture, text = layer(hidden_states=x, encoder_hidden_states=torch.cat([own, away], 1))
    for ours, theirs in ((picture, closed[0]), (text[:, :OWN], closed[1]), (text[:, OWN:], negative)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_attention_that_cannot_be_steered_says_so():
    layer = Attention(DIM, cross_attention_dim=6, heads=HEADS, dim_head=4, processor=AttnProcessor())
    layer.set_processor(around(layer.processor, steering(0.3)))
    with pytest.raises(ValueError, match="does not attend by scaled_dot_product_attention"):
        layer(torch.randn(B, N, DIM), torch.randn(B, OWN + AWAY, 6))


def test_attention_of_the_picture_alone_is_left_as_it_is():
    layer = Attention(DIM, heads=HEADS, dim_head=4)
    x = torch.randn(B, OWN + AWAY, DIM)  # as many tokens as both texts have
    plain = layer(x)
    layer.set_processor(around(layer.processor, steering(0.3)))
    assert torch.equal(layer(x), plain)


# --- students ---------------------------------------------------------------------------------------------------------

_STOCK = """
import json, sys
import torch
from diffusers import DiffusionPipeline

folder, out, subject = json.loads(sys.argv[1])
about = json.load(open(folder + "/fewstep.json"))
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
made = [
    pipe(**subject, **about["call"], **words, generator=torch.Generator().manual_seed(0), output_type="latent")[0]
    for words in ({}, {"nasa_scale": 0})
]
torch.save(made, out)
"""


def latents(pipe: DiffusionPipeline, subject: dict, **words) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**subject, **words, generator=torch.Generator().manual_seed(0), output_type="latent")[0]


@pytest.mark.parametrize("name", ["stable_diffusion", "flow"])
def test_a_student_steers_is_saved_and_runs_without_fewstep(recorded, trained, subject, tmp_path: Path, name: str):
    recording = recorded(name)
    plan = plan_student(recording, 2, renoise="ode")
    folder = export_student(recording, trained(recording), plan, tmp_path / "s", method="dmd2", base_model="a/b")
    ours, student = subject(recording), load(folder)
    plain = latents(student, ours)
    steered = fewstep.nasa(student, "a dog", 0.5)
    away = latents(steered, ours)
    assert not torch.allclose(away, plain, rtol=1e-2)
    assert torch.equal(latents(steered, ours, nasa_scale=0), plain)
    assert torch.equal(latents(fewstep.nasa(student, "a dog", 0), ours), plain)
    assert torch.equal(latents(student, ours), plain)  # what was given is as it was
    assert not torch.equal(latents(steered, ours, nasa_negative_prompt="a house"), away)
    two = {"prompt": [ours["prompt"]] * 2}
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    both = steered(**two, generator=generators, output_type="latent")[0]
    torch.testing.assert_close(both[:1], away, rtol=1e-4, atol=1e-4)

    steered.save_pretrained(tmp_path / "away")
    run_stock(_STOCK, json.dumps([str(tmp_path / "away"), str(tmp_path / "x.pt"), ours]))
    theirs = torch.load(tmp_path / "x.pt", weights_only=True)
    torch.testing.assert_close(theirs[0], away, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs[1], plain, rtol=1e-5, atol=1e-5)
    assert is_own_code(tmp_path / "away")
    again = load(tmp_path / "away")
    assert torch.equal(latents(again, ours), away)
    other = fewstep.nasa(again, "a house", 0.5)  # in the place of the negative prompt that it came with
    assert not torch.equal(latents(other, ours), away)
    code = tmp_path / "away" / "nasa.py"
    code.write_text(code.read_text() + "\n# more\n")
    with pytest.raises(UserError, match="trust_remote_code"):
        load(tmp_path / "away")


def test_the_command_samples_with_a_negative_prompt(
    recorded, trained, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    recording = recorded("stable_diffusion")
    plan = plan_student(recording, 1, renoise="ode")
    folder = export_student(recording, trained(recording), plan, tmp_path / "s", method="dmd2", base_model="a/b")
    words = ["sample", str(folder), "--prompt", "a cat", "--out"]
    pictures = []
    for more in ([], ["--negative_prompt", "a dog"], ["--negative_prompt", "a dog", "--nasa_scale", "0"]):
        assert main([*words, str(tmp_path / f"{len(pictures)}.png"), *more]) == 0
        pictures.append((tmp_path / f"{len(pictures)}.png").read_bytes())
    assert pictures[0] == pictures[2] != pictures[1]
    capfd.readouterr()
    for more, said in (
        (["--nasa_scale", "0.3"], "give negative_prompt"),
        (["--negative_prompt", "a dog", "--nasa_scale", "-1"], "must be a number from 0"),
    ):
        assert main([*words, str(tmp_path / "x.png"), *more]) == 2
        assert said in capfd.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_what_cannot_be_steered_is_refused():
    pipe = tiny_stable_diffusion()
    for arguments, said in (
        ((tiny_dit(), "x"), "takes no prompt"),
        ((pipe, "x", -0.1), "must be a number from 0"),
        ((pipe, "x", float("nan")), "must be a number from 0"),
        ((pipe, ["x"]), "must be one text"),
        (("a/folder", "x"), "only a pipeline can be steered"),
    ):
        with pytest.raises(UserError, match=said):
            fewstep.nasa(*arguments)
    pipe.unet.set_attn_processor(AttnProcessor())
    with pytest.raises(UserError, match="does not attend by scaled_dot_product_attention"):
        fewstep.nasa(pipe, "x")


#: Of the folder's families, those without prompts, and those whose text is in the picture's own sequence or pooled.
REFUSED = {"CogVideoX", "DDIM", "DiT", "HunyuanVideo", "Lumina2", "ZImage"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", names(metafunc.config, sample=True))


def test_networks_of_the_folder_are_steered_or_refused(zoo: Path, family: str):
    """Where nothing is subtracted the negative's tokens change nothing; where something is, the answer moves."""
    pipe = DiffusionPipeline.from_pretrained(zoo / family)
    call = {**call_of(zoo, family, pipe), "num_inference_steps": 1}
    stock = type(pipe)
    scales = {
        name for name in inspect.signature(stock.__call__).parameters if name.endswith(("guidance_scale", "cfg_scale"))
    }
    call |= dict.fromkeys(scales, 0.0 if family == "ZImage" else 1.0)
    if family in REFUSED:
        with pytest.raises(UserError):
            fewstep.nasa(_called(pipe, call), "c d")
        return
    steered = fewstep.nasa(_called(pipe, call), "c d", 0.5)
    network, given = first_call(pipe, stock, "a b", call)
    _, away = first_call(pipe, stock, "c d", call)
    with torch.no_grad():
        plain = network(**given)[0]
        answers = []
        for scale in (0.0, 0.5):
            with steering_of(network, away, scale, steered.config.nasa_text_first):
                answers.append(network(**given)[0])
    torch.testing.assert_close(answers[0], plain, rtol=1e-4, atol=1e-5)
    assert (answers[1] - plain).norm() > 1e-3 * plain.norm()


def _called(pipe: DiffusionPipeline, call: dict) -> DiffusionPipeline:
    """The pipeline as a student of that call, small and unguided."""
    filled = {name: value for name, value in call.items() if name not in ("prompt", "class_labels", "batch_size")}
    pipe.__class__ = type(type(pipe).__name__, (type(pipe),), {"fewstep": {"call": filled}})
    return pipe
