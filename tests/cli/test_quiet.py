"""What other libraries say while a command runs."""

import logging
import warnings

import pytest
from diffusers.utils import logging as of_diffusers
from transformers.utils import logging as of_transformers

from fewstep.cli.quiet import quiet_libraries

SLOWER = "`CLIPImageProcessor` requires torchvision (not installed); falling back to `CLIPImageProcessorPil`."
USELESS = "Expected types for text_encoder: (<class 'A'>,), got <class 'B'>."
CAST = "There are modules in AutoencoderKL that should be kept in float32: {}. Casting directly with `to()` can lead"
CHECKER = "You have disabled the safety checker for <class 'A'> by passing `safety_checker=None`."


@pytest.fixture(params=["diffusers", "transformers"])
def said(request):
    """A library's logger, and the lines that reach a user through its handlers."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    root = logging.getLogger(request.param)
    root.addHandler(handler)
    level = root.level
    root.setLevel(logging.WARNING)  # what else ran in this process may have made it quieter
    yield root.getChild("pipelines"), lines
    root.setLevel(level)
    root.removeHandler(handler)


def test_a_useless_line_is_gone_and_a_useful_one_is_said_once(said):
    logger, lines = said
    with quiet_libraries():
        for text in (USELESS, CHECKER, "weights are missing", CHECKER, USELESS, CAST.format([]), SLOWER):
            logger.warning(text)
        logger.warning(CAST.format(["norm"]))
    assert lines == [CHECKER, "weights are missing", CAST.format(["norm"])]


def test_what_is_said_afterwards_is_as_before(said):
    logger, lines = said
    with pytest.raises(KeyError), quiet_libraries():
        raise KeyError
    for text in (USELESS, CHECKER, CHECKER):
        logger.warning(text)
    assert lines == [USELESS, CHECKER, CHECKER]


def test_how_the_recorder_calls_a_pipeline_is_not_what_a_user_is_warned_of():
    told = {"category": FutureWarning, "filename": "f.py", "lineno": 1}
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with quiet_libraries():
            warnings.warn_explicit("two prompts and one image", module="diffusers.pipelines.a", **told)
            warnings.warn_explicit("of the user's own code", module="mine", **told)
    assert [str(one.message) for one in shown] == ["of the user's own code"]


@pytest.mark.parametrize("library", [of_diffusers, of_transformers])
@pytest.mark.parametrize("shown", [True, False])
def test_bars_of_loading_are_off_inside_and_then_as_before(library, shown):
    before = library.is_progress_bar_enabled()
    (library.enable_progress_bar if shown else library.disable_progress_bar)()
    try:
        with quiet_libraries():
            assert not library.is_progress_bar_enabled()
        assert library.is_progress_bar_enabled() == shown
    finally:
        (library.enable_progress_bar if before else library.disable_progress_bar)()
