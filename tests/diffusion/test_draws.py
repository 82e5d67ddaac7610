"""Random draws are functions of (seed, step, sample, name) and of nothing else."""

import pytest
import torch

from fewstep.diffusion import draws as module
from fewstep.diffusion.draws import Draws, keyed_generator, keyed_order


def test_draws_do_not_depend_on_how_samples_are_shared_out():
    whole = Draws(3, 7, range(8))
    parts = [Draws(3, 7, indices) for indices in (range(0, 3), range(3, 4), range(4, 8))]
    for draw in (
        lambda draws: draws.normal("noise", (2, 3)),
        lambda draws: draws.uniform("time"),
        lambda draws: draws.integers("index", 0, 1000),
    ):
        assert torch.equal(draw(whole), torch.cat([draw(part) for part in parts]))
    assert len({draws.shared_integer("step", 0, 10**6) for draws in (whole, *parts)}) == 1


def test_draws_do_not_depend_on_their_order_nor_on_the_global_generator():
    one, two = Draws(0, 0, [0, 1]), Draws(0, 0, [0, 1])
    first = one.uniform("a"), one.uniform("b")
    torch.manual_seed(123)
    second = two.uniform("b"), two.uniform("a")
    assert torch.equal(first[0], second[1])
    assert torch.equal(first[1], second[0])
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(123))


@pytest.mark.parametrize("other", [(1, 0, 0, "name"), (0, 1, 0, "name"), (0, 0, 1, "name"), (0, 0, 0, "eman")])
def test_every_part_of_the_key_matters(other: tuple[int, int, int, str]):
    def draw(seed: int, step: int, index: int, name: str) -> torch.Tensor:
        return Draws(seed, step, [index]).normal(name, (4,))

    assert not torch.equal(draw(0, 0, 0, "name"), draw(*other))


def test_shared_integers_differ_between_steps_and_cover_their_range():
    assert {Draws(0, step, []).shared_integer("student_step", 0, 4) for step in range(64)} == {0, 1, 2, 3}


def test_a_name_can_be_drawn_once_in_a_step():
    draws = Draws(0, 5, [0])
    draws.normal("noise", (2,))
    with pytest.raises(ValueError, match="'noise' was already made in step 5"):
        draws.uniform("noise")


def test_a_shared_name_can_be_drawn_once_in_a_step():
    draws = Draws(0, 5, [0])
    draws.shared_integer("student_step", 0, 4)
    with pytest.raises(ValueError, match="student_step"):
        draws.shared_integer("student_step", 0, 4)


def test_draws_have_the_distributions_they_name():
    draws = Draws(0, 0, range(4000))
    normal, uniform, integers = draws.normal("n", (2,)), draws.uniform("u"), draws.integers("i", -2, 3)
    assert normal.dtype == torch.float32
    assert normal.mean().abs() < 0.05
    assert normal.std().item() == pytest.approx(1, abs=0.05)
    assert uniform.dtype == torch.float64
    assert 0 <= uniform.min() < uniform.max() < 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.03)
    assert integers.unique().tolist() == [-2, -1, 0, 1, 2]
    assert torch.corrcoef(normal.T)[0, 1].abs() < 0.05


def test_a_generator_is_the_same_for_the_same_key_everywhere():
    assert torch.equal(
        torch.randn(3, generator=keyed_generator("a", 1)), torch.randn(3, generator=keyed_generator("a", 1))
    )
    assert keyed_generator(1, 23).initial_seed() != keyed_generator(12, 3).initial_seed()


def test_every_epoch_of_the_stream_holds_each_item_once_in_an_order_of_its_own():
    epochs = [[keyed_order(0, "prompts", 10, 10 * epoch + k) for k in range(10)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert [keyed_order(0, "prompts", 10, k) for k in range(10)] == epochs[0]  # also after going back
    assert [keyed_order(0, "real", 10, k) for k in range(10)] != epochs[0]


def test_coins_fall_as_often_as_asked_for_each_sample_by_itself():
    coins = Draws(0, 1, range(4000)).coins("dropout", 0.1)
    assert 0.08 < sum(coins) / 4000 < 0.12
    assert Draws(0, 1, range(100, 200)).coins("dropout", 0.1) == coins[100:200]


def test_what_belongs_to_no_step_of_a_training_has_a_step_of_its_own():
    steps = [value for name, value in vars(module).items() if name.endswith("_STEP")]
    assert len(set(steps)) == len(steps) == 6
    assert max(steps) < 0
