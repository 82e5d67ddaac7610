"""CLIP's tokens: the published vocabulary from any of its files, the end where a prompt is cut, what is counted."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import pytest
import torch
from tiny_clip import MERGES, VOCABULARY

from fewstep.data.durable import file_sha256
from fewstep.errors import UserError
from fewstep.eval.scorers import clip_tokens
from fewstep.eval.scorers.clip_tokens import ClipTokens, open_tokenizer, tokenizer_of
from fewstep.eval.weights import MissingWeightsError, Weights

BEGIN, END = VOCABULARY - 2, VOCABULARY - 1
A, B = 64, 65  # the letters' places among the printable bytes, "!" being 0
ENDS = 256  # what ends a word comes after the letters


def tokens(context: int = 77, *, cleaned: bool = True) -> ClipTokens:
    return ClipTokens(tokenizer_of(MERGES), context, cleaned=cleaned)


def test_tokens_are_merges_bytes_and_marks() -> None:
    row = tokens()(["The cat ab"])[0].tolist()
    the, cat = 512 + MERGES.index("th e</w>"), 512 + MERGES.index("ca t</w>")
    assert row[:6] == [BEGIN, the, cat, A, B + ENDS, END]
    assert row[6:] == [0] * 71


def test_a_long_prompt_keeps_the_end_and_is_counted() -> None:
    reader = tokens()
    fits, cut = reader([" ".join(["cat"] * 75), " ".join(["cat"] * 74 + ["the", "red"])])
    assert len(fits) == len(cut) == 77
    assert fits[-1] == cut[-1] == END
    assert fits[-2] == 512 + MERGES.index("ca t</w>")
    assert cut[-2] == 512 + MERGES.index("th e</w>")
    assert reader.note() == (
        "1 of 2 prompts are longer than the 77 tokens that CLIP takes: it judges by their beginnings."
    )
    reader(["the cat", " ".join(["cat"] * 74 + ["the", "red"])])
    assert reader.note().startswith("1 of 3 prompts")


def test_words_before_a_prompt_take_the_place_of_its_last_ones() -> None:
    """As DMD2 splices them in: begin, the words, and as much of the prompt as fits before the end."""
    reader = tokens()
    prompt = " ".join(["cat"] * 40 + ["red"] * 35)
    plain, spliced = reader([prompt])[0], reader([prompt], "the the the ")[0]
    assert spliced.tolist() == [BEGIN, *[512 + MERGES.index("th e</w>")] * 3, *plain[1:73].tolist(), END]
    assert reader.note().startswith("1 of 1 prompts")


def test_a_short_prompt_says_nothing() -> None:
    reader = tokens()
    reader(["the cat"])
    assert reader.note() is None


def test_escapes_and_curly_quotes_are_cleaned_where_the_published_tokenizer_does() -> None:
    pytest.importorskip("ftfy")
    plain, escaped = tokens()(["a 'b' & c", "a ‘b’ &amp;amp; c"])
    assert torch.equal(plain, escaped)
    plain, escaped = tokens(cleaned=False)(["a 'b' & c", "a ‘b’ &amp;amp; c"])
    assert not torch.equal(plain, escaped)


def test_without_ftfy_it_is_said_where_that_may_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_tokens.importlib.util, "find_spec", lambda name: None)
    reader = tokens()
    reader(["a &lt; b"])
    assert reader.note() is None
    reader(["a ‘b’"])
    assert reader.note().startswith("1 of 2 prompts have characters beyond ASCII")


def test_tokens_are_those_of_open_clip(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    (tmp_path / "bpe_simple_vocab_16e6.txt.gz").write_bytes(
        (Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    )
    tokenizer = open_tokenizer(Weights(tmp_path))
    prompts = ["a photo of a cat", "It’s  “1,024” Ünïcode’s 日本 🙂", "x &amp; y\n\n z", "", "word " * 90, "don't I'LL"]
    assert torch.equal(ClipTokens(tokenizer, 77, cleaned=True)(prompts), open_clip.get_tokenizer("ViT-H-14")(prompts))


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of weights, and a tiny list of merges in the place of the published one."""
    monkeypatch.setattr(clip_tokens, "_COUNT", len(MERGES))
    monkeypatch.setattr(clip_tokens, "_SHA256", hashlib.sha256("\n".join(MERGES).encode()).hexdigest())
    return tmp_path


def told(folder: Path) -> Weights:
    """Weights whose hashes somebody vouches for."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return Weights(folder, {path.relative_to(folder).as_posix(): file_sha256(path) for path in files})


@pytest.mark.parametrize("name", [file.name for file in clip_tokens.MERGES])
def test_any_of_the_published_files_will_do(name: str, published: Path) -> None:
    text = ("#version: 0.2\n" + "\n".join([*MERGES, "more than", "are used"]) + "\n").encode()
    (published / name).parent.mkdir(exist_ok=True)
    (published / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    ids = open_tokenizer(told(published))("the cat", add_special_tokens=False)["input_ids"]
    assert ids == [512 + MERGES.index("th e</w>"), 512 + MERGES.index("ca t</w>")]


@pytest.mark.parametrize(
    "content",
    [b"no archive", gzip.compress(b"#version\nt h\n"), gzip.compress(b"\xff\xfe")[:-4]],
    ids=["no archive", "other merges", "cut short"],  # an archive holds the time, and workers name tests alike
)
def test_other_merges_are_refused(content: bytes, published: Path) -> None:
    (published / clip_tokens.MERGES[0].name).write_bytes(content)
    with pytest.raises(UserError, match=r"bpe_simple_vocab_16e6\.txt\.gz"):
        open_tokenizer(told(published))


def test_a_damaged_file_is_refused_by_its_published_hash(tmp_path: Path) -> None:
    (tmp_path / clip_tokens.MERGES[0].name).write_bytes(b"\0" * 1356917)
    with pytest.raises(UserError, match="damaged"):
        open_tokenizer(Weights(tmp_path))


def test_without_a_file_one_sentence_names_all(tmp_path: Path) -> None:
    with pytest.raises(MissingWeightsError) as error:
        open_tokenizer(Weights(tmp_path))
    assert all(file.name in str(error.value) for file in clip_tokens.MERGES)
    assert "\n" not in str(error.value)
