"""Every method with ``--compile`` trains as without: what has no graph (derivatives, taps, second times) runs as it is.

Networks are traced and differentiated ahead and run without generated code; what a compiler makes has tests of its own.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fewstep.networks.compile_trial import compile_roles
from fewstep.programs import faster
from tests.end_to_end.method_cases import CASES, LORA
from tests.end_to_end.test_shared_steps import assert_same, trained

FORMS = {"full": {}, "lora": LORA}


@pytest.mark.soak
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_a_compiled_run_is_the_run(
    case: str, form: str, teacher: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "lora" and "student_network" in CASES[case][1]:
        pytest.skip("a smaller student is trained whole")
    monkeypatch.setattr(faster, "compile_roles", partial(compile_roles, backend="aot_eager"))
    ways = [
        trained(
            place / f"{case} {form} {compiled}", teacher, case, 1, {"batch_size": 4}, compile=compiled, **FORMS[form]
        )
        for compiled in (False, True)
    ]
    assert_same(case, *ways)
    said = (place / f"{case} {form} True_said" / "stderr_0.txt").read_text()
    assert said.count("compiled: teacher") == 1 and "stays uncompiled" not in said
