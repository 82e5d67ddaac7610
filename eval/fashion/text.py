"""The teachers' words: CLIP tokenizer files with one token a word, and tiny CLIP text encoders."""

import json
import string
from pathlib import Path

import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    FunnelBaseModel,
    FunnelConfig,
)

from fewstep.fashion.prompts import CLASSES, PROMPTS

# Start, "a photo of a t - shirt", end.
MAX_TOKENS = 9
# "sandal" before "ankle": the merge of s and a must win over that of a and n.
THINGS = ("sandal", "trousers", "pullover", "dress", "coat", "shirt", "sneaker", "bag", "ankle", "boot")
WORDS = (*THINGS, "photo", "of", "an", "a", "t")
START, END = "<|startoftext|>", "<|endoftext|>"
# Whole prompts, then the bare names, then the empty prompt.
TRAINED_PROMPTS = (*PROMPTS, *CLASSES, "")
EMPTY = len(TRAINED_PROMPTS) - 1


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Pieces with their numbers, and the merges that build each known word letter by letter."""
    letters = string.ascii_lowercase + string.digits + "-"
    pieces = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        merged, *rest = [*word[:-1], f"{word[-1]}</w>"]
        for symbol in rest:
            merges[merged, symbol] = None
            merged += symbol
            pieces.append(merged)
    return {piece: index for index, piece in enumerate([*dict.fromkeys(pieces), START, END])}, list(merges)


def make_tokenizer() -> CLIPTokenizer:
    """A stock CLIPTokenizer of letters, digits, the hyphen and the known words, one token each.

    Other words fall apart into letters, other characters become the end token; nothing raises.
    """
    vocabulary, merges = _vocabulary()
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)
    for prompt in TRAINED_PROMPTS:
        expected = 2 + len(prompt.replace("-", " - ").split())
        if len(tokenizer(prompt).input_ids) != expected:
            raise AssertionError(f"{prompt!r} is not one token a word: {tokenizer.tokenize(prompt)}")
    return tokenizer


def write_old_vocabulary(folder: Path) -> None:
    """Add the two files that the CLIPTokenizer of transformers 4 reads in place of tokenizer.json."""
    vocabulary, merges = _vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocabulary) + "\n")
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")


def token_ids(tokenizer: CLIPTokenizer) -> torch.Tensor:
    """int64 (21, 9): the trained prompts as the pipelines tokenize them."""
    return tokenizer(
        list(TRAINED_PROMPTS), padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def draw_prompts(
    labels: torch.Tensor, generator: torch.Generator, bare: float = 0.15, empty: float = 0.1
) -> torch.Tensor:
    """Which trained prompt each image gets, int64 (B,): mostly the whole one, now and then the bare name or none."""
    draw = torch.rand(labels.shape, generator=generator)
    chosen = torch.where(draw < empty + bare, labels + len(PROMPTS), labels)
    return torch.where(draw < empty, torch.full_like(labels, EMPTY), chosen)


def _config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=width // 16,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_text_encoder(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModel:
    """For the Stable Diffusion pipeline."""
    return CLIPTextModel(_config(tokenizer, width))


def make_projected_text_encoder(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModelWithProjection:
    """For the Stable Diffusion 3 pipeline, which also reads the pooled, projected output."""
    return CLIPTextModelWithProjection(_config(tokenizer, width))


def make_silent_encoder(tokenizer: CLIPTokenizer, width: int) -> FunnelBaseModel:
    """A third encoder for the Stable Diffusion 3 pipeline that says one zero token, whatever it reads.

    The default call of that pipeline pads the third text to 256 tokens, and without a third encoder it adds 256 zero
    tokens: sixteen times as many as the image has. No file of the pipeline changes that, but the transformer sees as
    many tokens as the encoder gives, and a Funnel transformer halves them with each block: eight blocks leave one.
    All its weights are zero, so it is the usual missing third encoder, only shorter.
    """
    config = FunnelConfig(
        vocab_size=len(tokenizer),
        d_model=width,
        # An empty first block: the first halving comes before any attention over 256 tokens.
        block_sizes=[0] + [1] * 8,
        n_head=1,
        d_head=1,
        d_inner=1,
        separate_cls=False,
        truncate_seq=False,
        pool_q_only=False,
        pad_token_id=None,
    )
    model = FunnelBaseModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model
