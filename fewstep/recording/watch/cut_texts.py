"""Prompts that are longer than their encoder reads: counted, in the place of a warning for each of them."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

# What pipelines and tokenizers say of a text that is too long, in their own words.
_SAID = ("truncated because", "longer than the specified maximum sequence length")


@contextlib.contextmanager
def cut_texts(pipeline: Any) -> Iterator[dict[str, int]]:
    """Inside, what the pipeline's tokenizers cut is noted; they and the pipeline say nothing of it themselves.

    Yields:
        tokenizer's name -> the number of tokens at which it cut a text; empty as long as none was cut.
    """
    cut: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet_about_cuts(pipeline))
        seen: set[int] = set()
        for name, part in pipeline.components.items():
            if isinstance(part, PreTrainedTokenizerBase) and id(part) not in seen:
                seen.add(id(part))
                stack.enter_context(_noting(name, part, cut))
        yield cut


@contextlib.contextmanager
def quiet_about_cuts(pipeline: Any) -> Iterator[None]:
    """Inside, no warning says that a text was cut."""
    names = {kind.__module__ for kind in type(pipeline).__mro__} | {"transformers.tokenization_utils_base"}
    loggers = [logging.getLogger(name) for name in sorted(names)]
    for logger in loggers:
        logger.addFilter(_says_something_else)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_says_something_else)


def _says_something_else(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in _SAID)


@contextlib.contextmanager
def _noting(name: str, tokenizer: PreTrainedTokenizerBase, cut: dict[str, int]) -> Iterator[None]:
    """Inside, each call of a tokenizer that cuts a text is noted in `cut`; its class is still a subclass of its own."""
    kind = type(tokenizer)

    @functools.wraps(kind.__call__)
    def call(self: PreTrainedTokenizerBase, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("truncation") and text is not None:
            limit = kwargs.get("max_length") or self.model_max_length
            special = kwargs.get("add_special_tokens", True)
            for one in [text] if isinstance(text, str) else text:
                whole = kind.__call__(self, one, add_special_tokens=special, verbose=False)
                if len(whole["input_ids"]) > limit:
                    cut[name] = limit
        return kind.__call__(self, text, *args, **kwargs)

    tokenizer.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
    try:
        yield
    finally:
        tokenizer.__class__ = kind
