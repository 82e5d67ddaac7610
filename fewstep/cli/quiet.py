"""What other libraries say while a command runs, without the lines that tell a user nothing."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

#: Such lines, from their beginning: a part is of another class than its pipeline's own, which the recording's proof
#: covers; a cast, of a network that keeps no module in float32; and a slower way to read pictures, without torchvision.
_USELESS = re.compile(
    r"Expected types for |You have passed a non-standard module |"
    r"There are modules in \w+ that should be kept in float32: \[\]|"
    r"`\w+` requires torchvision \(not installed\); falling back to "
)
_LIBRARIES = ("diffusers", "transformers")


class _Useful(logging.Filter):
    """Passes a line that tells a user something, once: a command loads a pipeline several times over."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if _USELESS.match(text) or text in self._said:
            return False
        self._said.add(text)
        return True


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, diffusers and transformers show no bars of loading and writing, no useless line, and no line twice.

    Errors and warnings of other kinds stay, as do the bars of downloads. A command that needs diffusers imports it
    before; where that is not imported yet, nothing is done.
    """
    if "diffusers" not in sys.modules:
        yield
        return
    from diffusers.utils import logging as of_diffusers  # they take seconds, and not every command needs them
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as of_transformers

    modules = (of_diffusers, of_transformers)
    shown = [module.is_progress_bar_enabled() for module in modules]
    handlers = [handler for name in _LIBRARIES for handler in logging.getLogger(name).handlers]
    downloads = not are_progress_bars_disabled()
    for module in modules:
        module.disable_progress_bar()
    if downloads:  # which transformers' switch turns off too
        enable_progress_bars()
    filters = [(handler, _Useful()) for handler in handlers]  # each its own: a line may go to several of them
    for handler, only_useful in filters:
        handler.addFilter(only_useful)
    try:
        with warnings.catch_warnings():
            # Of a library's own code, in the versions that this package asks for.
            warnings.filterwarnings("ignore", message=r".*torch\.jit\.script.* is deprecated")
            # Of how a pipeline is called to learn what it does.
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"diffusers\.")
            # Of an image that it then refuses, or reads all the same.
            warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
            yield
    finally:
        for handler, only_useful in filters:
            handler.removeFilter(only_useful)
        for module, enabled in zip(modules, shown, strict=True):
            if enabled:
                module.enable_progress_bar()
