"""Where weights are found, which are believed, and what is said of those that are not there."""

import hashlib
import io
import pickle
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import nn

from fewstep.errors import UserError
from fewstep.eval.weights import Found, MissingWeightsError, WeightFile, Weights, load_strictly, read_state

CONTENT = b"weights as they were published"
DIGEST = hashlib.sha256(CONTENT).hexdigest()
PUBLISHED = WeightFile("net.pt", "a network", DIGEST, len(CONTENT))
UNPUBLISHED = WeightFile("part/model.safetensors", "another network", hub="somebody/part")


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable, and a hub's cache of the test's own."""
    monkeypatch.delenv("FEWSTEP_WEIGHTS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)


def folder_with(folder: Path, name: str = "net.pt", content: bytes = CONTENT) -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder


def cached(tmp_path: Path, content: bytes, digest: str) -> Path:
    """The hub's cache with one large file, as huggingface_hub lays it out."""
    repository = tmp_path / "hub" / "models--somebody--part"
    folder_with(repository / "blobs", digest, content)
    folder_with(repository / "refs", "main", b"0123abc")
    link = repository / "snapshots" / "0123abc" / "model.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to(f"../../blobs/{digest}")
    return link


def test_the_folder_comes_before_the_variable_and_the_variable_before_the_cache(tmp_path, monkeypatch):
    link = cached(tmp_path, CONTENT, DIGEST)
    told = {UNPUBLISHED.name: DIGEST}
    assert Weights(None, told).find(UNPUBLISHED).path == link
    variable = folder_with(tmp_path / "variable", UNPUBLISHED.name)
    monkeypatch.setenv("FEWSTEP_WEIGHTS", str(variable))
    assert Weights(None, told).find(UNPUBLISHED).path == variable / UNPUBLISHED.name
    folder = folder_with(tmp_path / "folder", UNPUBLISHED.name)
    assert Weights(folder, told).find(UNPUBLISHED).path == folder / UNPUBLISHED.name


def test_a_published_hash_makes_a_file_verified(tmp_path):
    folder = folder_with(tmp_path)
    assert Weights(folder).find(PUBLISHED) == Found(folder / "net.pt", DIGEST, True)


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT[:-1] + b"!"], ids=["cut", "changed"])
def test_a_damaged_file_is_named(tmp_path, content):
    with pytest.raises(UserError, match=r"net\.pt is damaged.*"):
        Weights(folder_with(tmp_path, content=content)).find(PUBLISHED)


def test_a_file_nobody_published_a_hash_of_needs_the_users(tmp_path):
    weights = Weights(folder_with(tmp_path, UNPUBLISHED.name))
    with pytest.raises(UserError, match=r"--weights_sha256 part/model.safetensors=HEX"):
        weights.find(UNPUBLISHED)
    found = Weights(weights.folder, {UNPUBLISHED.name: DIGEST.upper()}).find(UNPUBLISHED)
    assert found.sha256 == DIGEST and not found.verified
    with pytest.raises(UserError, match="told by --weights_sha256"):
        Weights(weights.folder, {UNPUBLISHED.name: 64 * "0"}).find(UNPUBLISHED)


def test_a_told_hash_stands_in_for_the_published_one(tmp_path):
    other = b"another network under the same name"
    digest = hashlib.sha256(other).hexdigest()
    folder = folder_with(tmp_path, content=other)
    assert Weights(folder, {"net.pt": digest}).find(PUBLISHED) == Found(folder / "net.pt", digest, False)
    # The published file is what it is, though its hash was told, too.
    assert Weights(folder_with(tmp_path), {"net.pt": DIGEST}).find(PUBLISHED).verified


def test_the_hubs_cache_says_which_hash_its_repository_gave(tmp_path):
    cached(tmp_path, CONTENT, DIGEST)
    assert Weights().find(UNPUBLISHED).verified
    damaged = WeightFile("damaged/model.safetensors", "a network", hub="somebody/part")
    (tmp_path / "hub/models--somebody--part/blobs" / DIGEST).write_bytes(b"cut")
    with pytest.raises(UserError, match="is damaged or another file"):
        Weights().find(damaged)


def test_what_is_missing_is_said_in_one_sentence(tmp_path):
    with pytest.raises(MissingWeightsError) as error:
        Weights(tmp_path).find(WeightFile("net.pt", "a network", DIGEST, 3 * 2**20))
    assert str(error.value) == (
        "net.pt is missing (a network, 3 MiB): put it into the folder of --weights or $FEWSTEP_WEIGHTS under this name"
    )
    # The cache is looked into, the network is not asked: the suite's guard would raise.
    with pytest.raises(MissingWeightsError, match=r"or fetch it by `hf download somebody/part model.safetensors`"):
        Weights().find(UNPUBLISHED)


def test_what_is_told_wrongly_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--weights is no folder"):
        Weights(tmp_path / "nowhere")
    with pytest.raises(UserError, match="64 hexadecimal digits"):
        Weights(told={"net.pt": "f00d"})
    monkeypatch.setenv("FEWSTEP_WEIGHTS", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"\$FEWSTEP_WEIGHTS is no folder"):
        Weights()


# --- tensors ----------------------------------------------------------------------------------------------------------


def found(path: Path) -> Found:
    return Found(path, "", False)


def test_both_formats_are_read(tmp_path):
    state = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pth")
    for name in ("a.safetensors", "a.pth"):
        read = read_state(found(tmp_path / name))
        assert read.keys() == state.keys() and all(torch.equal(read[key], state[key]) for key in state)


def test_what_is_no_state_is_refused_and_not_run(tmp_path):
    class Runs:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    buffer = io.BytesIO()
    pickle.dump(Runs(), buffer)
    torch.save({"weight": [1, 2]}, tmp_path / "list.pth")
    contents = {"code.pth": buffer.getvalue(), "text.pth": b"hello", "text.safetensors": b"hello", "empty.pth": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in (*contents, "list.pth", "nothing.pth"):
        with pytest.raises(UserError) as error:
            read_state(found(tmp_path / name))
        assert name in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_a_network_takes_its_own_names_and_shapes_alone(tmp_path):
    with init_empty_weights():
        network = nn.Linear(3, 2)
    state = {"weight": torch.ones(2, 3, dtype=torch.float16), "bias": torch.zeros(2)}
    for other, words in (
        ({"weight": state["weight"]}, "it lacks bias"),
        ({**state, "scale": torch.ones(1)}, "it has also scale"),
        ({**state, "bias": torch.ones(5)}, "bias is 5, not 2"),
        ({**state, **{f"extra{i}": torch.ones(1) for i in range(5)}}, "extra0, extra1, extra2 and 2 more"),
    ):
        with pytest.raises(UserError, match=words):
            load_strictly(network, other, tmp_path / "net.pt")
    loaded = load_strictly(network, state, tmp_path / "net.pt")
    assert not loaded.training and not loaded.weight.requires_grad and loaded.weight.dtype == torch.float32
    assert torch.equal(loaded(torch.ones(1, 3)), torch.full((1, 2), 3.0))
