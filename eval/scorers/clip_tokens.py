"""Prompts as the tokens of CLIP, from the published list of merges alone: no network, no vocabulary file beside it."""

from __future__ import annotations

import gzip
import hashlib
import html
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import UserError, one_line
from fewstep.eval.scorers.files import first_found
from fewstep.eval.weights import Found, WeightFile, Weights

#: All published CLIP networks here share one list; these files hold it, and any of them will do.
MERGES = (
    WeightFile(
        "bpe_simple_vocab_16e6.txt.gz",
        "the vocabulary of CLIP, from the repository openai/CLIP on GitHub or from the package open_clip_torch",
        sha256="924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
        size=1356917,
    ),
    WeightFile(
        "clip-vit-large-patch14/merges.txt",
        "the vocabulary of CLIP as transformers keeps it",
        sha256="9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a",
        size=524619,
        hub="openai/clip-vit-large-patch14",
    ),
    WeightFile(
        "clip-vit-base-patch32/merges.txt",
        "the vocabulary of CLIP as transformers keeps it",
        sha256="f526393189112391ce6f9795d4695f704121ce452c3aad1f5335cc41337eba85",
        size=524657,
        hub="openai/clip-vit-base-patch32",
    ),
)
_COUNT = 49408 - 2 * 256 - 2  # merges: all tokens but the bytes, the bytes that end a word, and the two marks
_SHA256 = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"  # of the merges, one a line
_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"


class ClipTokens:
    """Prompts -> tokens, cut to what the network takes; counts what it has cut.

    tokenizer: of transformers. context: the number of tokens that the network takes, 77. cleaned: whether prompts are
    cleaned first as OpenAI's and open_clip's tokenizers do it: ftfy, then HTML's escapes. transformers' does not.
    """

    def __init__(self, tokenizer: Any, context: int, *, cleaned: bool) -> None:
        self._tokenizer, self._context, self._cleaned = tokenizer, context, cleaned
        self._ftfy = cleaned and importlib.util.find_spec("ftfy") is not None
        self._seen: set[str] = set()
        self._cut: set[str] = set()
        self._unclean: set[str] = set()

    def __call__(self, prompts: Sequence[str], words_before: str = "") -> Tensor:
        """int64 (N, context): begin, tokens, end, and zeros behind it, which the causal network does not see.

        A longer prompt loses its last tokens; the end's token stays, because the network's answer is read there.
        words_before: put in front of every prompt.
        """
        return torch.stack([self._row(prompt, words_before) for prompt in prompts])

    def note(self) -> str | None:
        """How many prompts were cut, and how many could not be cleaned for want of ftfy."""
        sentences = []
        if self._cut:
            sentences.append(
                f"{len(self._cut)} of {len(self._seen)} prompts are longer than the {self._context} tokens that CLIP "
                "takes: it judges by their beginnings"
            )
        if self._unclean:
            sentences.append(
                f"{len(self._unclean)} of {len(self._seen)} prompts have characters beyond ASCII, which the published "
                "tokenizer cleans by ftfy: install ftfy for its exact tokens"
            )
        return ". ".join(sentences) + "." if sentences else None

    def _row(self, prompt: str, words_before: str) -> Tensor:
        ids = self._tokenizer(words_before + self._clean(prompt), add_special_tokens=False)["input_ids"]
        begin, end = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        self._seen.add(prompt)
        if len(ids) > self._context - 2:
            self._cut.add(prompt)
        ids = [begin, *ids[: self._context - 2], end]
        return torch.tensor(ids + [0] * (self._context - len(ids)))

    def _clean(self, prompt: str) -> str:
        if not self._cleaned:
            return prompt
        if self._ftfy:
            import ftfy

            prompt = ftfy.fix_text(prompt)
        elif not prompt.isascii():
            self._unclean.add(prompt)
        return html.unescape(html.unescape(prompt)).strip()


def open_tokenizer(weights: Weights) -> Any:
    """transformers' tokenizer of CLIP from the first file of ``MERGES`` that is there.

    Raises:
        MissingWeightsError: none of them is.
        UserError: the file is damaged, or holds other merges.
    """
    return tokenizer_of(_merges(first_found(weights, MERGES)))


def tokenizer_of(merges: Sequence[str]) -> Any:
    """transformers' tokenizer of CLIP; its vocabulary is bytes, bytes that end a word, what is merged, and two marks.

    Args:
        merges: pairs of tokens with a space between, in the order in which they are made.
    """
    from transformers import CLIPTokenizer

    letters = _byte_letters()
    pairs = [tuple(merge.split(" ")) for merge in merges]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in pairs), _BEGIN, _END]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=pairs)


def _merges(found: Found) -> list[str]:
    """The merges that a file holds, behind a first line that says what it is."""
    try:
        raw = found.path.read_bytes()
        text = (gzip.decompress(raw) if found.path.suffix == ".gz" else raw).decode("utf-8")
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{found.path} is no list of merges: {one_line(error)}") from error
    merges = text.split("\n")[1 : _COUNT + 1]
    if hashlib.sha256("\n".join(merges).encode()).hexdigest() != _SHA256:
        raise UserError(f"{found.path} does not hold the merges of CLIP's vocabulary: get {MERGES[0].name} once more")
    return merges


def _byte_letters() -> list[str]:
    """A printable letter for each byte in the order of CLIP's vocabulary: bytes with one of their own come first."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in own] + [chr(256 + i) for i in range(256 - len(own))]
