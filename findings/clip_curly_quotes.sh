#!/usr/bin/env bash
# transformers' CLIPTokenizer reads a curly quote and an HTML escape as other tokens than CLIP's own tokenizer.
#
# Guess: with the same vocabulary and merges, transformers' CLIPTokenizer gives the tokens of OpenAI's CLIP and of open_clip.
# Seen: those clean a prompt first, by ftfy and by html.unescape: a typographic apostrophe becomes the plain one, &amp; becomes &.
# transformers 5 does neither, also where ftfy is installed. So "a cat’s hat" has other tokens, and another CLIP score, by the
# two libraries; prompts in plain ASCII without escapes have the same.
set -euo pipefail
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check "torch==2.14.1" "transformers==5.24.0" "open_clip_torch==3.3.0" "ftfy==6.3.1"
"$place/env/bin/python" -W ignore - <<'PYTHON'
import gzip
from pathlib import Path

import ftfy
import open_clip
import torch
import transformers
from transformers import CLIPTokenizer

print("transformers", transformers.__version__, "open_clip", open_clip.__version__, "ftfy", ftfy.__version__)
theirs = open_clip.SimpleTokenizer()
lines = gzip.open(Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz"), "rt", encoding="utf-8").read().split("\n")
words = {word: number for word, number in theirs.encoder.items() if number < 49406}
marks = {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
ours = CLIPTokenizer(vocab=words | marks, merges=[tuple(line.split()) for line in lines[1:48895]])

same = {}
for prompt in ("a cat's hat", "a photo of 2 dogs, 4k", "a cat’s hat", "“red” shoes", "salt &amp; pepper"):
    one = theirs([prompt])[0]
    two = torch.tensor(ours(prompt)["input_ids"])
    same[prompt] = torch.equal(one[: len(two)], two) and not one[len(two) :].any()
    print(f"{prompt!r}: {'the same tokens' if same[prompt] else f'{one[one > 0].tolist()} by open_clip, {two.tolist()} here'}")
assert list(same.values()) == [True, True, False, False, False], "the tokens are not those that were seen"
PYTHON
