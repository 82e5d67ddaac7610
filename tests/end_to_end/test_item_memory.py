"""What a run from a cache of many items takes in memory: what one of few takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from item_sets import write_items

from fewstep.cli import main

_RUN = ["--max_steps", "30", "--batch_size", "8", "--steps", "2", "--cpu", "--report_to", "none", "--sample_steps", "0"]
#: Runs the command line, and prints the most that this process had in memory, in kB.
_MEASURED = """
import json, re, sys
from fewstep.cli import main
assert main(json.loads(sys.argv[1])) == 0
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.soak
def test_a_run_takes_as_much_memory_with_800_items_as_with_8(editor: Path, tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs a system that says what a process took")
    peaks = {}
    for count in (8, 800):
        items, cache = write_items(tmp_path / f"{count}", count), str(tmp_path / f"cache_{count}")
        assert main(["cache", "--teacher", str(editor), "--items", str(items), "--out", cache, "--cpu"]) == 0
        words = ["distill", "dmd2", "--teacher", str(editor), "--cache", cache, "--out", str(tmp_path / f"run_{count}")]
        python = [sys.executable, "-c", _MEASURED, json.dumps([*words, *_RUN])]
        peaks[count] = int(subprocess.run(python, capture_output=True, text=True, check=True).stdout.split()[-1])
    assert peaks[800] < 1.05 * peaks[8], peaks
