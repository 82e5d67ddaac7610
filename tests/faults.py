"""Faults below a folder: a program that dies, a machine that loses power, or a disk that is full, at a chosen moment.

What changes files is counted: folders made, files opened and finished, tensors written, names given and taken, and
what is waited for to be on the disk. The operation with a given number fails, and from then on

- ``death``: every other one too, so that nothing tidies up; a file that was being written is half there;
- ``power``: likewise, and a file has only what somebody waited for;
- ``full``: every other one that needs room; names can still be changed and files removed.

Nothing outside the folder notices.
"""

from __future__ import annotations

import errno
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from safetensors import SafetensorError

from fewstep.errors import UserError

KINDS = ("death", "power", "full")
_GROWING = frozenset({"mkdir", "open", "close", "tensors", "fsync", "link"})


class Death(BaseException):
    """The program is gone: no ``except Exception`` and no clause for users' mistakes sees it."""


class Faults:
    """The operations below a folder, counted, and the one that fails.

    Args:
        root: the folder; it may not be there yet.
        number: of the operation that fails, from 1; 0 for none.
        kind: of :data:`KINDS`.
        on: only these operations count, by a part of what they are done to; default: all.
    """

    def __init__(self, root: Path, number: int, kind: str = "death", on: str = "") -> None:
        self.root, self.number, self.kind, self.on = os.path.realpath(root), number, kind, on
        self.count = 0
        self.done: list[str] = []
        self.happened = ""
        self.synced = {os.stat(path).st_ino: os.stat(path).st_size for path in self._files()}

    def act(self, name: str, path: str, do: Callable[[], Any], halve: Callable[[], None] = lambda: None) -> Any:
        """Do something to a file, or fail."""
        if not (path + "/").startswith(self.root + "/"):
            return do()
        if self.happened:
            return self._fail(name, path) if self.kind != "full" or name in _GROWING else do()
        told = f"{name} {path.removeprefix(self.root)}"
        if self.on in path and (self.kind != "full" or name in _GROWING):
            self.count += 1
            if self.count == self.number:
                self.happened = told
                halve()
                self._fail(name, path)
        result = do()
        self.done.append(told)
        return result

    def _fail(self, name: str, path: str) -> None:
        if self.kind != "full":
            raise Death(self.happened)
        if name == "tensors":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device", path)

    def halve(self, path: str) -> None:
        """Leave half of a file, and what was on the disk already."""
        found = os.stat(path)
        os.truncate(path, max(found.st_size // 2, min(self.synced.get(found.st_ino, 0), found.st_size)))

    def lose(self) -> None:
        """What nobody waited for is not on the disk."""
        for path in self._files():
            found = os.stat(path)
            kept = self.synced.get(found.st_ino, 0)
            if kept < found.st_size:
                os.truncate(path, kept)

    def _files(self) -> Iterator[str]:
        for folder, _, names in os.walk(self.root):
            yield from (os.path.join(folder, name) for name in names)


@contextmanager
def faults(root: Path, number: int, kind: str = "death", on: str = "") -> Iterator[Faults]:
    """In this block the operation with this number below ``root`` fails. The fault itself is the caller's to catch."""
    fault = Faults(root, number, kind, on)
    with pytest.MonkeyPatch.context() as patch:
        _patch(patch, fault)
        yield fault
    if kind == "power" and fault.happened:
        fault.lose()


def _patch(patch: pytest.MonkeyPatch, fault: Faults) -> None:
    names = ("rename", "replace", "mkdir", "unlink", "remove", "rmdir", "fsync", "link")
    own = {name: getattr(os, name) for name in names}
    opened, serialized = io.open, safetensors.torch.serialize_file

    def place(path: Any, dir_fd: int | None = None) -> str:
        folder = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else os.getcwd()
        return os.path.normpath(os.path.join(folder, os.fsdecode(path)))

    def simple(name: str) -> Callable[..., Any]:
        def act(path: Any, *rest: Any, dir_fd: int | None = None, **more: Any) -> Any:
            further = more if dir_fd is None else {**more, "dir_fd": dir_fd}
            return fault.act(name, place(path, dir_fd), lambda: own[name](path, *rest, **further))

        return act

    def fsync(descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()

        def wait() -> None:
            own["fsync"](number)
            found = os.fstat(number)
            fault.synced[found.st_ino] = found.st_size

        fault.act("fsync", os.readlink(f"/proc/self/fd/{number}"), wait)

    def open_file(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if isinstance(path, int) or not set(mode) & set("wax+"):
            return opened(path, mode, *rest, **more)
        where = place(path)
        file = fault.act("open", where, lambda: opened(path, mode, *rest, **more))
        close = file.close

        def finish() -> None:
            if file.closed:
                return

            def halve() -> None:
                close()
                fault.halve(where)

            fault.act("close", where, close, halve)

        file.close = finish
        return file

    def serialize(tensors: Any, path: Any, *rest: Any, **more: Any) -> None:
        where = place(path)

        def halve() -> None:
            serialized(tensors, path, *rest, **more)
            fault.halve(where)

        fault.act("tensors", where, lambda: serialized(tensors, path, *rest, **more), halve)

    for name in own:
        patch.setattr(os, name, fsync if name == "fsync" else simple(name))
    patch.setattr(io, "open", open_file)
    patch.setattr("builtins.open", open_file)
    patch.setattr(safetensors.torch, "serialize_file", serialize)


def every_fault(
    kind: str,
    work: Callable[[Path], object],
    check: Callable[[Path, Faults], None],
    at_least: int,
    before: Callable[[Path], object] = lambda root: None,
    on: str = "",
) -> None:
    """Let ``work`` fail at each of its operations, each time in a new folder, and ``check`` what is left there.

    Args:
        kind: of :data:`KINDS`.
        work: what is done in a folder; the full disk may end it with any exception that is one line for the user.
        check: goes on without a fault, and compares.
        at_least: so many operations there must be, or something is not seen any more.
        before: makes what is in the folder already.
        on: as in :class:`Faults`.
    """
    number = 0
    while True:
        number += 1
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "root"
            before(root)
            with faults(root, number, kind, on) as fault:
                ended = _end_of(work, root)
            if not fault.happened:
                assert ended is None, ended
                break
            if kind == "full":
                assert _is_one_line(ended), f"{fault.happened}: {ended!r}"
            else:
                assert isinstance(ended, Death), f"{fault.happened}: {ended!r}"
            check(root, fault)
    assert number > at_least


def _end_of(work: Callable[[Path], object], root: Path) -> BaseException | None:
    try:
        work(root)
    except (Exception, Death) as error:
        return error
    return None


def _is_one_line(error: BaseException | None) -> bool:

    return (isinstance(error, UserError) and "\n" not in str(error)) or (
        isinstance(error, OSError) and error.errno == 28
    )
