"""Continuous-time consistency's times, weights and warm-up, as numbers that are known beforehand."""

import math

import pytest
from toys import TABLE

from tests.trainers.toy_continuous import batch, config, vector_method


def test_times_lie_between_a_tables_second_entry_and_the_students_start():
    for mean, expected in ((-20.0, 2e-3), (20.0, 1.0)):
        method = vector_method(config(level_mean=mean, level_std=1e-3), TABLE, "epsilon")
        assert method.drawn(batch(0)).tolist() == [expected] * 8


@pytest.mark.parametrize("weighting", ["karras", "1/c_out"])
def test_a_weight_by_noise_level_is_of_the_same_data_as_trigflow(weighting: str):
    sigma, data = 2.0, 0.8
    told = {
        "level_mean": math.log(sigma),
        "level_std": 1e-9,
        "sigma_data": data,
        "log_variance": False,
        "tangent_warmup": 0,
    }
    plain, weighted = (
        vector_method(config(weighting=name, **told)).continuous(0, batch(0))[0].item()
        for name in ("uniform", weighting)
    )
    expected = 1 / sigma**2 + 1 / data**2 if weighting == "karras" else math.hypot(sigma, data) / (sigma * data)
    assert plain > 0 and weighted / plain == pytest.approx(expected, rel=1e-5)


def test_what_the_network_is_slow_to_learn_is_warmed_up_by_the_step():
    """The student is its teacher here, so that all of the tangent is of this kind."""
    method = vector_method(config(tangent_warmup=4))
    sizes = [method.continuous(step, batch(0))[1]["student/tangent"].item() for step in (0, 1, 2, 4, 8)]
    assert sizes == pytest.approx([share * sizes[-1] for share in (0, 0.25, 0.5, 1, 1)], rel=1e-4) and sizes[-1] > 0


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_run_is_uneven_where_micro_batches_differ_in_what_they_ask(share: float, size: int):
    method = vector_method(config("tcm", transition=0.7, boundary_share=share, batch_size=size))
    parts = [method.times.boundary(range(start, start + size)) for start in range(0, 40 * size, size)]
    asked = {(len(rows) < size, len(rows) > 0) for rows in parts}
    assert method.uneven == (len(asked) > 1)
    assert not vector_method(config("scm", batch_size=size)).uneven
