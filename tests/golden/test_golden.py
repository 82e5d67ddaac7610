"""Numbers computed by the methods' own authors' code, met by ours: ``pytest -k golden --golden DIR``.

A new file of a known case needs no code: everything is read from its options and tensors. A new case is a function in
a ``*_cases.py`` file here and its line in that file's ``CASES``.
"""

from pathlib import Path

import any_flow_cases
import consistency_model_cases
import continuous_cases
import dmd2_cases
import ect_cases
import lcm_cases
import matching_cases
import mdt_dist_cases
import mean_flow_cases
import mf_rae_cases
import perflow_cases
import primitive_cases
import pytest
import rectified_flow_cases
import segmented_cases
import sid_cases
import twin_flow_cases
import walk_cases
from golden_file import GoldenFile

CASES = {
    **primitive_cases.CASES,
    **dmd2_cases.CASES,
    **matching_cases.CASES,
    **sid_cases.CASES,
    **consistency_model_cases.CASES,
    **ect_cases.CASES,
    **lcm_cases.CASES,
    **perflow_cases.CASES,
    **rectified_flow_cases.CASES,
    **segmented_cases.CASES,
    **mean_flow_cases.CASES,
    **mf_rae_cases.CASES,
    **continuous_cases.CASES,
    **any_flow_cases.CASES,
    **twin_flow_cases.CASES,
    **mdt_dist_cases.CASES,
    **walk_cases.CASES,
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = metafunc.config.getoption("golden")
    if folder is None:
        skip = pytest.mark.skip(reason="no golden files: give --golden DIR")
        metafunc.parametrize("path", [pytest.param(None, marks=skip, id="none")])
        return
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise pytest.UsageError(f"--golden {folder} holds no .safetensors files")
    metafunc.parametrize("path", files, ids=lambda path: path.stem)


def test_golden(path: Path):
    golden = GoldenFile(path)
    if golden.case not in CASES:
        pytest.skip(f"{golden.case}: no method of this case is built yet")
    CASES[golden.case](golden)
    golden.finish()
