"""What diffusers warns of is no news where its answer is checked anyway."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from diffusers.utils import logging


@contextlib.contextmanager
def only_errors() -> Iterator[None]:
    """Inside, diffusers logs errors alone."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
