"""Guidance by three answers, and by a scale for each frame: what is asked, and what comes out."""

import pytest
import torch
from torch import Tensor
from toys import TinyNetwork, labels, role

from fewstep.conditioning.conditioning import Conditioning, Leaf
from fewstep.conditioning.ragged import in_groups, join, with_others
from fewstep.diffusion.intervals import TimedScale, TimeIntervals
from fewstep.diffusion.scales import PlacedScale, one_number, plain_scale
from fewstep.diffusion.schedule import FlowSchedule
from fewstep.errors import UserError
from fewstep.kernels import guided_x0, score_gap
from fewstep.networks.guidance import GuidedDenoiser, guide

X = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
T = torch.tensor([0.2, 0.9], dtype=torch.float64)
#: What each of two samples is told for its three answers.
TOLD = ([1.0, 2.0], [-3.0, 5.0], [0.5, -4.0])


def numbers(values: list[float], width: int = 1) -> Conditioning:
    tensor = torch.tensor(values, dtype=torch.float64)[:, None].expand(-1, width)
    return Conditioning({"number": Leaf(tensor, rows=1)}, len(values))


def told() -> Conditioning:
    return with_others(numbers(TOLD[0]), [numbers(each) for each in TOLD[1:]])


class Model:
    """x0 = x sin(number) + t; it notes the numbers of every call."""

    def __init__(self) -> None:
        self.asked: list[list[float]] = []

    def __call__(self, x: Tensor, t: Tensor, conditioning: Conditioning, end: Tensor | None = None) -> Tensor:
        number = conditioning.arguments()["number"][:, :1]
        self.asked.append(number.flatten().tolist())
        return x * number.sin()[:, :, None] + t[:, None, None]


def answers(scales: tuple[float, float], joint: bool = True) -> tuple[Tensor, list[list[float]]]:
    model = Model()
    guided = GuidedDenoiser(model, scales[0], further=2, joint=joint, later=scales[1:])
    assert guided.of(model).calls == guided.calls
    return guided(X, T, told()), model.asked


def wanted(text: float, image: float) -> Tensor:
    """u + w_t (t - i) + w_i (i - u) (InstructPix2Pix, Eq. 3)."""
    t, i, u = (Model()(X, T, numbers(each)) for each in TOLD)
    return u + text * (t - i) + image * (i - u)


@pytest.mark.parametrize(
    ("scales", "asked"),
    [
        ((6.0, 1.5), (2, 1, 0)),
        ((1.5, 1.5), (2, 0)),  # i has no weight
        ((6.0, 1.0), (1, 0)),  # u has none
        ((0.0, 1.5), (2, 1)),
        ((0.0, 0.0), (2,)),
        ((6.0, 0.0), (2, 1, 0)),
    ],
)
def test_three_answers_have_two_scales_and_one_without_weight_is_not_asked(
    scales: tuple[float, float], asked: tuple[int, ...]
) -> None:
    found, joint = answers(scales)
    torch.testing.assert_close(found, wanted(*scales), rtol=1e-12, atol=1e-12)
    assert joint == [[number for answer in asked for number in TOLD[answer]]]
    found, apart = answers(scales, joint=False)
    torch.testing.assert_close(found, wanted(*scales), rtol=1e-12, atol=1e-12)
    assert apart == [TOLD[answer] for answer in asked]


def test_a_scale_of_one_is_off_whatever_the_later_one_is() -> None:
    found, asked = answers((1.0, 1.5))
    assert torch.equal(found, Model()(X, T, numbers(TOLD[0]))) and asked == [TOLD[0]]


def test_a_pair_gives_the_guided_answer_at_every_first_scale() -> None:
    guided = GuidedDenoiser(Model(), 4.0, further=2, later=(1.5,))
    for scale in (0.0, 2.0, 7.5):
        made = guide(*guided.pair(X, T, told()), scale)
        torch.testing.assert_close(made, wanted(scale, 1.5), rtol=1e-12, atol=1e-12)
    each = guided(X, T, told(), guidance_scale=torch.tensor([2.0, 7.5]))
    for k, scale in enumerate((2.0, 7.5)):
        torch.testing.assert_close(each[k], wanted(scale, 1.5)[k], rtol=1e-12, atol=1e-12)


def test_answers_of_several_shapes_are_asked_apart_and_each_sample_has_its_own() -> None:
    model = Model()
    items = [
        with_others(numbers([1.0]), [numbers([-3.0], 2), numbers([0.5])]),
        with_others(numbers([2.0], 3), [numbers([5.0], 2), numbers([-4.0])]),
    ]

    def grouped(x: Tensor, t: Tensor, conditioning: Conditioning, end: Tensor | None = None) -> Tensor:
        return in_groups(model, x, t, conditioning, end)

    found = GuidedDenoiser(grouped, 6.0, further=2, later=(1.5,))(X, T, join(items))
    torch.testing.assert_close(found, wanted(6.0, 1.5), rtol=1e-12, atol=1e-12)
    assert sorted(len(call) for call in model.asked) == [1, 2, 3]


def test_a_network_of_three_answers_is_converted_once() -> None:
    one = role("teacher", TinyNetwork(6).double(), FlowSchedule(), "flow")
    x, each = torch.randn(2, 6, dtype=torch.float64), [labels(values, None) for values in TOLD]
    guided = GuidedDenoiser(one, 6.0, further=2, later=(1.5,))
    t, i, u = (one(x, T, label) for label in each)
    found = guided(x, T, with_others(each[0], each[1:]))
    torch.testing.assert_close(found, u + 6 * (t - i) + 1.5 * (i - u), rtol=1e-10, atol=1e-10)


def test_every_further_answer_but_the_first_has_a_scale() -> None:
    for further, later in ((2, ()), (1, (1.5,)), (0, (1.5,))):
        with pytest.raises(ValueError, match="later scales"):
            GuidedDenoiser(Model(), 1.0, further, later=later)


# --- a scale for each frame ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [1, 2])
def test_each_place_has_its_own_scale(axis: int) -> None:
    scales = (1.0, 2.0, 3.0)[: X.shape[axis]]
    positive, negative = numbers(TOLD[0]), numbers(TOLD[1])
    guided = GuidedDenoiser(Model(), PlacedScale(scales, axis))
    assert guided.calls == 2
    found = guided(X, T, with_others(positive, [negative]))
    for place, scale in enumerate(scales):
        alone = guide(Model()(X, T, positive), Model()(X, T, negative), scale)
        torch.testing.assert_close(found.select(axis, place), alone.select(axis, place), rtol=1e-12, atol=1e-12)


def test_a_network_is_guided_place_by_place() -> None:
    """Under every form of the kernel that runs here, also where a critic is matched by it."""
    x, t = torch.randn(4, 3, 5, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    positive, negative = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    w = PlacedScale((1.0, 2.0, 3.0), 1).at(t, x)
    for form in (guided_x0.reference, guided_x0.closed, guided_x0.guided_x0):
        made = form(x, t, -t, positive, negative, w)
        own = t[:, None, None] * x - t[:, None, None] * (negative + w * (positive - negative))
        torch.testing.assert_close(made, own, rtol=1e-12, atol=1e-12)
    for gap in (score_gap.reference, score_gap.closed, score_gap.score_gap):
        _, gradient = gap(x, positive, negative=negative, positive=positive, share=w)
        own = (x - positive + w * (negative - positive)) / x.numel()
        torch.testing.assert_close(gradient, own, rtol=1e-12, atol=1e-12)


def test_a_sample_of_other_places_is_refused() -> None:
    with pytest.raises(ValueError, match="3 guidance scales along axis 1 of samples"):
        PlacedScale((1.0, 2.0, 3.0), 1).at(T, torch.zeros(2, 4, 2))


def test_scales_in_words_and_in_json() -> None:
    timed = TimedScale(TimeIntervals(FlowSchedule(), (0.5, 0.0)), (4.0, 3.0))
    placed = PlacedScale((1.0, 3.0), 1)
    assert [plain_scale(scale) for scale in (2.0, timed, placed)] == [2.0, [4.0, 3.0], [1.0, 3.0]]
    assert plain_scale(6.0, (1.5,)) == [6.0, 1.5]
    assert one_number(2.0, "the method") == 2.0
    with pytest.raises(
        UserError, match=r"the method needs a guidance of one number, and this teacher's is \[1.0, 3.0\]"
    ):
        one_number(placed, "the method")
