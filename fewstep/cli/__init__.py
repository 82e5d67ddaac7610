"""The command line, one file for each command.

Exit codes: 0 done, 2 the user can mend it (one line on stderr says how), 130 interrupted by Ctrl-C or SIGTERM, of a
training after a checkpoint; 1 of ``fewstep bench``: something is not as it should be. Any other 1 is a bug, and comes
with its traceback.
"""

from __future__ import annotations

import importlib
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from fewstep.errors import Interrupted, UserError, first_line, of_the_system, one_line, printable
from fewstep.version import __version__

USAGE = """fewstep: few-step distillation of diffusion and flow-matching pipelines

  fewstep demo                          distil an embedded teacher and compare both
  fewstep probe TEACHER                 show what is recorded of a pipeline, and prove it
  fewstep plan TEACHER [METHOD] ...     say what a run would take, without the weights
  fewstep cache --teacher ... --out DIR encode prompts or labels once, for distill --cache
  fewstep pairs --teacher ... --out DIR make noise-sample pairs of a teacher
  fewstep distill METHOD --teacher ...  train a student; METHOD auto: the best measured one
  fewstep verdict OUT                   say whether a training works, from its log
  fewstep sample DIR --out FILE.png     sample from a student
  fewstep eval DIR [DIR ...] --out DIR  measure students beside their teacher
  fewstep compare DIR DIR --out DIR     join reports of several evaluations
  fewstep bench                         measure the training core on this machine

fewstep COMMAND --help lists the flags of a command; fewstep distill METHOD --help those of a method.
"""

_LESS_MEMORY = "a training also takes --mixed_precision bf16, --gradient_checkpointing and --lora_rank"

#: The file of each command; it is imported when the command is given, because most of them need seconds of imports.
COMMANDS = {
    "demo": "demo",
    "probe": "probe",
    "plan": "plan",
    "cache": "cache",
    "pairs": "pairs",
    "distill": "distill",
    "verdict": "verdict",
    "sample": "sample",
    "eval": "evaluate",
    "compare": "compare",
    "bench": "bench",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code; tracebacks are for bugs."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fewstep").setLevel(logging.INFO)
    try:
        if not words or words[0] in ("-h", "--help"):
            print(USAGE, end="")
            return 0
        if words[0] == "--version":
            print(__version__)
            return 0
        if words[0] not in COMMANDS:
            raise UserError(f"there is no command {words[0]!r}; there are: {', '.join(COMMANDS)}")
        with _termination_heeded():
            return _run(words[0], words[1:])
    except UserError as error:
        return _refused(str(error))
    except Exception as error:
        if of_the_system(error):
            return _refused(f"{one_line(error)}; mend that and start again, with --resume where a run was going on")
        if not _is_lack_of_memory(error):
            raise
        return _refused(f"{first_line(error)} Lower --batch_size; {_LESS_MEMORY}")
    except KeyboardInterrupt:
        kept = "; --resume goes on with what is finished" if words[:1] in (["distill"], ["pairs"], ["cache"]) else ""
        print(f"fewstep: interrupted{kept}", file=sys.stderr)
        return 130


@contextmanager
def _termination_heeded() -> Iterator[None]:
    """SIGTERM ends the program as Ctrl-C does, so that it removes what it has half written."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # whoever runs it there handles signals
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _refused(message: str) -> int:
    """Say in one line what the user can mend, and give the exit code."""
    print(f"fewstep: {printable(message)}", file=sys.stderr)
    return 2


def _is_lack_of_memory(error: BaseException) -> bool:
    """A GPU's or the machine's; torch, which says both in a way of its own, is not imported for every command."""
    names = (type(error).__name__, str(error))
    return isinstance(error, MemoryError) or names[0] == "OutOfMemoryError" or "DefaultCPUAllocator" in names[1]


def _run(command: str, words: Sequence[str]) -> int:
    from fewstep.cli.quiet import quiet_libraries

    program = importlib.import_module(f"fewstep.cli.{COMMANDS[command]}")
    try:
        with quiet_libraries():
            return program.run(words) or 0
    except Interrupted:
        print("fewstep: interrupted; a checkpoint is written, --resume goes on from it", file=sys.stderr)
        return 130
