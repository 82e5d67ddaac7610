"""Statistics in files: ours, those of EDM and clean-fid, and those that are none."""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.errors import UserError
from fewstep.eval import stats_files
from fewstep.eval.metrics.frechet import feature_statistics, frechet_distance
from fewstep.eval.stats_files import FeatureStatistics, read_stats, write_stats

MEAN, COVARIANCE = feature_statistics(torch.randn(40, 5, generator=torch.Generator().manual_seed(0)))


def test_what_is_written_is_read_by_us_and_as_edm_reads_it(tmp_path: Path):
    path = tmp_path / "stats.npz"
    write_stats(path, FeatureStatistics(MEAN, COVARIANCE, 40, "inception-2015-12-05", 64 * "a", "clean"))
    found = read_stats(path)
    assert torch.equal(found.mean, MEAN) and torch.allclose(found.covariance, COVARIANCE, atol=1e-15)
    assert (found.num, found.extractor, found.weights_sha256, found.resize) == (
        *(40, "inception-2015-12-05", 64 * "a"),
        "clean",
    )
    with np.load(path) as file:  # no pickle is in it
        reference = dict(file)
    assert reference["mu"].dtype == reference["sigma"].dtype == np.float64
    assert reference["mu"].shape == (5,) and reference["sigma"].shape == (5, 5)
    assert [file.name for file in tmp_path.iterdir()] == ["stats.npz"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_edms_clean_fids_and_adms_layouts_are_read(tmp_path: Path, dtype):
    """EDM and clean-fid have mu and sigma alone, ADM also images and statistics of another layer."""
    mean, covariance = MEAN.numpy().astype(dtype), COVARIANCE.numpy().astype(dtype)
    np.savez(tmp_path / "edm.npz", mu=mean, sigma=covariance)
    np.savez_compressed(tmp_path / "clean.npz", mu=mean, sigma=covariance)
    images = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "adm.npz", arr_0=images, mu=mean, sigma=covariance, mu_s=mean, sigma_s=covariance)
    for name in ("edm.npz", "clean.npz", "adm.npz"):
        found = read_stats(tmp_path / name)
        assert found.mean.dtype == found.covariance.dtype == torch.float64 and found.num is None
        assert frechet_distance(found.mean, found.covariance, MEAN, COVARIANCE) == pytest.approx(0, abs=1e-6)


def entries(**changed: np.ndarray) -> dict[str, np.ndarray]:
    return {"mu": MEAN.numpy(), "sigma": COVARIANCE.numpy(), **changed}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"mu": MEAN.numpy()}, "has no sigma: statistics are mu"),
        ({"arr_0": MEAN.numpy()}, "has no mu and no sigma"),
        (entries(mu=np.zeros(4)), r"mu is \(4,\) and sigma \(5, 5\), where \(d,\) and \(d, d\) belong"),
        (entries(mu=np.zeros((5, 1))), r"mu is \(5, 1\)"),
        (entries(mu=np.zeros(0), sigma=np.zeros((0, 0))), r"mu is \(0,\)"),
        (entries(mu=np.full(5, np.nan)), "not finite"),
        (entries(sigma=np.arange(25.0).reshape(5, 5)), "sigma is no covariance"),
        (entries(sigma=-COVARIANCE.numpy()), "sigma is no covariance"),
        (entries(mu=np.zeros(5, dtype=np.int64)), "its mu is of int64"),
        (entries(n=np.asarray(0)), "no number of images: its n is 0"),
        (entries(n=np.asarray(1.5)), "no number of images"),
        (entries(extractor=np.asarray(3)), "its extractor is no text"),
    ],
)
def test_other_numbers_are_refused_in_one_line(tmp_path: Path, content, words):
    path = tmp_path / "stats.npz"
    np.savez(path, **content)
    with pytest.raises(UserError, match=words) as error:
        read_stats(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_other_files_are_refused_in_one_line(tmp_path: Path):
    np.savez(tmp_path / "whole.npz", **entries())
    whole = (tmp_path / "whole.npz").read_bytes()
    np.save(tmp_path / "one.npy", MEAN.numpy())
    contents = {
        "cut.npz": whole[:-40],
        "changed.npz": whole[:200] + bytes([whole[200] ^ 255]) + whole[201:],
        "empty.npz": b"",
        "stats.pkl": pickle.dumps({"fid": entries()}),
        "one.npy": (tmp_path / "one.npy").read_bytes(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in (*contents, "nothing.npz"):
        with pytest.raises(UserError) as error:
            read_stats(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)


def archive(path: Path, **arrays: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in arrays.items():
            file.writestr(f"{name}.npy", content)
    return path


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_no_pickle_is_run_and_no_file_fills_the_memory(tmp_path: Path, monkeypatch):
    class Runs:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    np.savez(tmp_path / "object.npz", mu=np.array([Runs()], dtype=object), sigma=np.eye(1))
    with pytest.raises(UserError, match="its mu is damaged"):
        read_stats(tmp_path / "object.npz")
    assert not (tmp_path / "ran").exists()
    # A header that promises more than there is, which numpy would reserve.
    lying = npy(np.zeros(4)).replace(b"(4,)", b"(9999999999999,)")
    with pytest.raises(UserError, match="its mu is damaged"):
        read_stats(archive(tmp_path / "lying.npz", mu=lying, sigma=npy(np.eye(4))))
    monkeypatch.setattr(stats_files, "_MOST_BYTES", 10_000)
    with pytest.raises(UserError, match="its sigma is too large"):
        read_stats(archive(tmp_path / "bomb.npz", mu=npy(np.zeros(100)), sigma=npy(np.zeros((100, 100)))))
