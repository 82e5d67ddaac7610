"""Options and guards of all tests: where golden numbers and tiny pipelines lie; no network, one thread, fixed seeds."""

import builtins
import gc
import os
import random
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("OMP_NUM_THREADS", "1")
# diffusers copies a student's own code to here under the same name for all, and imports what is then there: other
# processes of tests, or of this machine, must not write to the same place.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="fewstep_tests_")

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter, which is chosen when Triton is first imported, by diffusers at the latest.
    os.environ["TRITON_INTERPRET"] = "1"

from item_sets import tiny_editor, write_items
from zoo_image import REFERENCES

from fewstep.pytest_plugin import add_options

_BESIDE = Path(__file__).resolve().parents[2] / "shared"
#: The files that take longest: they begin first, or one core would wait for another at the end.
_LONGEST = ("programs/test_plan.py", "end_to_end/test_full.py", "cli/test_demo.py", "end_to_end/test_zoo.py")
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1", "0.0.0.0", "::", ""})


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(
        parser
    )  # for an environment whose install is older than the entry point that does it, or in another folder


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        # A plan has fake tensors of a GPU. Where the first backward pass of a process comes after them, autograd
        # starts a thread for it, and no process that is forked from then on (tests/forked.py) can go backward.
        torch.ones(1, requires_grad=True).sum().backward()
        # Each torch.manual_seed writes down the stack of its caller, for a GPU that is found later.
        torch.cuda.manual_seed_all = lambda _seed: None
    # Python takes the bytecode of a file for that of another one of the same size and second, which two students' own
    # code may be: where a file is in the place of the folder, none is kept.
    code = Path(os.environ["HF_MODULES_CACHE"], "diffusers_modules", "local")
    code.mkdir(parents=True, exist_ok=True)
    (code / "__pycache__").touch()
    for name in ("golden", "zoo"):
        given = config.getoption(name)
        if given is not None and not Path(given).is_dir():
            raise pytest.UsageError(f"--{name} {given} is not a folder")
        setattr(config.option, f"{name}_given", given is not None)
        default = _BESIDE / name
        setattr(config.option, name, Path(given) if given is not None else default if default.is_dir() else None)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    places = {tests / name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    """What imports and collection made stays until the end; every collection of garbage would look through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def texts_as_they_are() -> Iterator[None]:
    """Wan's pipelines repair texts with ftfy, which need not be installed here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "ftfy", SimpleNamespace(fix_text=str), raising=False)
        yield


@pytest.fixture(scope="module")
def small_references() -> Iterator[None]:
    """QwenImageEditPlus brings its references to fewer pixels than its class says: the same mechanism, sooner."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", REFERENCES)
        yield


@pytest.fixture(scope="session")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a tiny pipeline that edits pictures."""
    folder = tmp_path_factory.mktemp("editor")
    tiny_editor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three items for it, in a file."""
    return write_items(tmp_path_factory.mktemp("items"), 3)


@pytest.fixture(scope="session")
def zoo(pytestconfig: pytest.Config) -> Path:
    folder = pytestconfig.getoption("zoo")
    if folder is None:
        pytest.skip("no folder of tiny pipelines: give --zoo DIR")
    return folder


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Connections and name look-ups beyond this machine fail, so that no test depends on a server."""

    def refuse(host: Any) -> None:
        name = host.decode() if isinstance(host, bytes) else host
        if isinstance(name, str) and name not in _LOOPBACK and name != socket.gethostname():
            raise OSError(f"a test wanted to reach {name}; tests run without a network")

    def guard(connect: Any) -> Any:
        def guarded(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                refuse(address[0])
            return connect(self, address)

        return guarded

    look_up = socket.getaddrinfo

    def guarded_look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        refuse(host)
        return look_up(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guard(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", guard(socket.socket.connect_ex))
        patch.setattr(socket, "getaddrinfo", guarded_look_up)
        yield


@pytest.fixture(scope="session", autouse=True)
def short_previews() -> Iterator[None]:
    """The teacher's row of a sample grid has two steps: in all of them, a grid costs more than the rest of a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewstep.training.samples.TEACHER_STEPS", 2)
        yield


@pytest.fixture(scope="session", autouse=True)
def equal_teachers_are_proven_once() -> Iterator[None]:
    from proven import proven_once  # not at the top: the process that hands out the tests imports no diffusers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewstep.programs.teacher.record", proven_once)
        yield


@pytest.fixture(scope="session", autouse=True)
def relatives_are_walked_where_asked() -> Iterator[None]:
    """Students are exported without a walk of their relatives, half of a tiny run's time; see with_relatives."""
    with pytest.MonkeyPatch.context() as patch:
        for place in ("fewstep.export.whole", "fewstep.export.lora"):
            patch.setattr(f"{place}.walk_relatives", lambda *_: {})
        yield


@pytest.fixture(scope="module")
def with_relatives() -> Iterator[None]:
    """Students are exported with it, in files that are about relatives, or about the way of a user."""
    from fewstep.export.related.walk import walk_relatives

    with pytest.MonkeyPatch.context() as patch:
        for place in ("fewstep.export.whole", "fewstep.export.lora"):
            patch.setattr(f"{place}.walk_relatives", walk_relatives)
        yield


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
