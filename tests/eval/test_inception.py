"""The network of FID under its three resizes, with stand-ins for its weights, and beside clean-fid where that is."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from stub_weights import StubInception, inception_folder, told

from fewstep.errors import UserError
from fewstep.eval.extractors import inception
from fewstep.eval.extractors.inception import STATE, TORCHSCRIPT, InceptionExtractor
from fewstep.eval.extractors.inception_network import InceptionNetwork
from fewstep.eval.extractors.kinds import EXTRACTORS, frechet_name, open_extractor
from fewstep.eval.metrics.frechet import feature_statistics, frechet_distance
from fewstep.eval.weights import MissingWeightsError, WeightFile, Weights

FEW = 16  # features that distances are taken of: clean-fid's root of 2048x2048 takes long


def pictures(num: int, seed: int = 0, size: tuple[int, int] = (40, 52), channels: int = 3) -> torch.Tensor:
    """Smooth coloured noise: pictures whose distances are not all alike."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(num, channels, 6, 7, generator=generator) * (0.5 + 0.5 * (seed == 0))
    return (F.interpolate(coarse, size, mode="bicubic").clamp(0, 1) * 255).round().byte()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inception_folder(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict of the published layout, its norms set by pictures, so that features differ from each other."""
    torch.manual_seed(0)
    network = InceptionNetwork()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
            module.bias.data.normal_(0, 0.2)
    with torch.no_grad():
        network.train()(F.interpolate(pictures(2).float(), (299, 299)) / 127.5 - 1)
    folder = tmp_path_factory.mktemp("state")
    torch.save(network.state_dict(), folder / STATE.name)
    return folder


def test_clean_is_pillows_filter_in_floating_point(folder):
    images = pictures(3)
    found = InceptionExtractor(told(folder, TORCHSCRIPT), batch_size=2)(images)
    sized = [
        [
            Image.fromarray(channel.numpy().astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)
            for channel in x
        ]
        for x in images
    ]
    sized = torch.from_numpy(np.array(sized)).clamp(0, 255)
    torch.manual_seed(0)
    expected = StubInception().layers((sized - 128) / 128)
    assert found.logits is None and found.features.shape == (3, 2048) and found.features.dtype == torch.float32
    assert torch.allclose(found.features, expected, atol=1e-5)


def test_legacy_tensorflow_leaves_the_resize_to_the_network(folder):
    images = pictures(3)
    found = InceptionExtractor(told(folder, TORCHSCRIPT), mode="legacy_tensorflow")(images).features
    torch.manual_seed(0)
    assert torch.allclose(found, StubInception()(images.float(), return_features=True), atol=1e-5)
    clean = InceptionExtractor(told(folder, TORCHSCRIPT))(images).features
    assert (found - clean).abs().max() > 1e-3


def test_legacy_pytorch_has_its_own_file_and_network(state_folder):
    images = pictures(2)
    extractor = InceptionExtractor(told(state_folder, STATE), mode="legacy_pytorch", batch_size=1)
    found = extractor(images).features
    network = InceptionNetwork().eval()
    network.load_state_dict(torch.load(state_folder / STATE.name, weights_only=True))
    with torch.no_grad():
        sized = F.interpolate(images[1:].float(), (299, 299), mode="bilinear", align_corners=False)
        expected = network(sized / 127.5 - 1)
    assert found.shape == (2, 2048) and (found[0] - found[1]).abs().mean() > 0.01
    assert torch.allclose(found[1:], expected, atol=1e-4)
    assert extractor.name == "inception-2015-12-05-pytorch" and "no antialias" in extractor.resize


def test_the_network_has_the_size_of_the_published_file():
    """566 tensors in float32, with a few percent for their names, as pytorch-fid's file has them."""
    state = InceptionNetwork().state_dict()
    assert len(state) == 566
    assert 0 < STATE.size - sum(4 * tensor.numel() for tensor in state.values()) < 0.005 * STATE.size


def test_the_network_is_torchvisions_with_tensorflows_pools(state_folder, monkeypatch):
    """Same names, same shapes, same features: averages without padding, and a maximum in the last block."""
    theirs = pytest.importorskip("torchvision.models.inception")
    average, last = F.avg_pool2d, []

    def pool(x, kernel_size, stride, padding):
        if last:
            return F.max_pool2d(x, kernel_size, stride, padding)
        return average(x, kernel_size, stride, padding, count_include_pad=False)

    reference = theirs.Inception3(num_classes=1008, aux_logits=False, transform_input=False, init_weights=False).eval()
    state = torch.load(state_folder / STATE.name, weights_only=True)
    reference.load_state_dict(state)
    network = InceptionNetwork().eval()
    network.load_state_dict(state)
    reference.fc = torch.nn.Identity()
    reference.Mixed_7c.register_forward_pre_hook(lambda *given: last.append(given))
    monkeypatch.setattr(theirs.F, "avg_pool2d", pool)
    x = F.interpolate(pictures(1).float(), (299, 299)) / 127.5 - 1
    with torch.no_grad():
        expected = reference(x)
        monkeypatch.undo()
        assert torch.allclose(network(x), expected, atol=1e-5)


def test_grey_is_colour_three_times_and_batches_change_nothing(folder):
    extractor = InceptionExtractor(told(folder, TORCHSCRIPT), batch_size=2)
    grey = pictures(5, channels=1)
    found = extractor(grey).features
    assert torch.equal(found, extractor(grey.repeat(1, 3, 1, 1)).features)
    assert torch.allclose(found[3:], extractor(grey[3:]).features, atol=1e-6)
    assert extractor.accepts((1, 8, 8)) and extractor.accepts((3, 1024, 512)) and not extractor.accepts((4, 8, 8))
    with pytest.raises(ValueError, match="expected uint8 images"):
        extractor(grey.float())


def test_only_the_published_file_gives_an_fid(folder, monkeypatch):
    weights = told(folder, TORCHSCRIPT)
    assert frechet_name(InceptionExtractor(weights)) == "FD-inception-2015-12-05"
    published = WeightFile(TORCHSCRIPT.name, "", weights.told[TORCHSCRIPT.name])
    monkeypatch.setattr(inception, "TORCHSCRIPT", published)
    extractor = InceptionExtractor(Weights(folder))
    assert extractor.verified and frechet_name(extractor) == "FID"


def test_another_file_or_network_is_refused(tmp_path, folder):
    with pytest.raises(UserError, match=r"is damaged: it has \d+ bytes, not 95607719"):
        InceptionExtractor(Weights(folder))
    with pytest.raises(ValueError, match="clean, legacy_tensorflow, legacy_pytorch, not 'bicubic'"):
        InceptionExtractor(told(folder, TORCHSCRIPT), mode="bicubic")
    (tmp_path / TORCHSCRIPT.name).write_bytes(b"no network")
    with pytest.raises(UserError, match="is no TorchScript"):
        InceptionExtractor(told(tmp_path, TORCHSCRIPT))(pictures(1))
    inception_folder(tmp_path, StubInception(width=8))
    with pytest.raises(UserError, match="it gives 8 features, not 2048"):
        InceptionExtractor(told(tmp_path, TORCHSCRIPT))(pictures(1))
    inception_folder(tmp_path, torch.nn.Identity())
    with pytest.raises(UserError, match="is another network"):
        InceptionExtractor(told(tmp_path, TORCHSCRIPT))(pictures(1))
    torch.save({"fc.weight": torch.ones(3)}, tmp_path / STATE.name)
    with pytest.raises(
        UserError, match=r"does not fit InceptionNetwork: it lacks Conv2d_1a_3x3.bn.bias, .* and \d+ more"
    ):
        InceptionExtractor(told(tmp_path, STATE), mode="legacy_pytorch")(pictures(1))


@pytest.mark.parametrize("kind", [kind for kind in EXTRACTORS if kind != "fashion"])
def test_every_kind_says_in_one_sentence_what_it_lacks(tmp_path, monkeypatch, kind):
    monkeypatch.delenv("FEWSTEP_WEIGHTS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(
        MissingWeightsError, match=r"^\S+ is missing \(.*\): put it into the folder of --weights"
    ) as error:
        open_extractor(kind, Weights())
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="unknown extractor swav; there are inception"):
        open_extractor("swav", Weights())


def test_the_embedded_classifier_lacks_nothing():
    extractor = open_extractor("fashion", Weights())
    assert extractor.verified and frechet_name(extractor) == "FD-fashion-classifier-64"


# --- beside clean-fid -------------------------------------------------------------------------------------------------


def save(images: torch.Tensor, folder: Path) -> str:
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:04}.png")
    return str(folder)


@pytest.mark.parametrize("mode", ["clean", "legacy_tensorflow", "legacy_pytorch"])
def test_distances_are_those_of_clean_fid(tmp_path, folder, state_folder, mode, monkeypatch):
    """To 1e-6 relative, with the same network injected into both."""
    pytest.importorskip("cleanfid", reason="clean-fid is not installed (pip install -e '.[eval]')")
    scipy = pytest.importorskip("scipy")
    if tuple(map(int, scipy.__version__.split(".")[:2])) >= (1, 18):
        pytest.skip("clean-fid's distance cannot be computed with SciPy 1.18 and later")
    from cleanfid import fid, inception_pytorch
    from cleanfid.inception_torchscript import InceptionV3W

    of_pytorch = mode == "legacy_pytorch"
    if of_pytorch:
        state = torch.load(state_folder / STATE.name, weights_only=True)
        monkeypatch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *args, **kwargs: state)
        network = inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False).eval()
    else:
        network = InceptionV3W(str(folder), download=False, resize_inside=mode == "legacy_tensorflow")
    real, fake = pictures(20), pictures(18, seed=1)
    theirs = fid.compute_fid(
        save(fake, tmp_path / "fake"),
        save(real, tmp_path / "real"),
        mode=mode,
        num_workers=0,
        device=torch.device("cpu"),
        verbose=False,
        custom_feat_extractor=lambda x: (network(x / 255)[0].flatten(1) if of_pytorch else network(x))[:, :FEW],
    )
    weights = told(state_folder, STATE) if of_pytorch else told(folder, TORCHSCRIPT)
    extractor = InceptionExtractor(weights, mode=mode)
    statistics = [feature_statistics(extractor(images).features[:, :FEW]) for images in (fake, real)]
    ours = frechet_distance(*statistics[0], *statistics[1])
    assert theirs > 1e-4
    assert ours == pytest.approx(theirs, rel=1e-6)
