"""Is it working? Runs that were made to go wrong are told in plain words, healthy ones are not, and what follows."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from toys import Labels, TinyMethod, TinyNetwork, make_loop, role

from fewstep.cli import main
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.rollout import Sampler, draw_sample
from fewstep.diffusion.schedule import FlowSchedule
from fewstep.errors import UserError
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.trainers.dmd2 import Dmd2, Dmd2Config
from fewstep.training import checkpoint
from fewstep.training.loop import Loop
from fewstep.training.spread import beside
from fewstep.training.verdict import RECENT, History, judged, read_log, troubles
from tests.training.loop_runs import config, rows, weights

# --- runs that are made to go wrong ----------------------------------------------------------------------------------


def toy_loop(out: Path, spoil: Callable[[Dmd2], None] = lambda method: None, kind: str = "flow", **settings) -> Loop:
    """DMD2 over vectors of 6; student and critic start as the teacher."""
    shared = {"teacher": "toy", "out": str(out), "report_to": "none", "critic_updates": 2, "batch_size": 8}
    shared |= {"max_steps": 120, "log_steps": 2, "sample_steps": 20, "checkpointing_steps": 20, "lr": 1e-3}
    chosen = Dmd2Config(**{**shared, **settings})
    torch.manual_seed(0)
    teacher, roles = TinyNetwork(6), {}
    for name in ("teacher", "student", "critic"):
        network = TinyNetwork(6)
        network.load_state_dict(teacher.state_dict())
        roles[name] = role(name, network, FlowSchedule(), kind, trainable=name != "teacher")
    sampler = Sampler(FlowSchedule(), (1.0, 0.5), "fresh")
    method = Dmd2(chosen, roles, GuidedDenoiser(roles["teacher"], 1.0, further=0), sampler)
    spoil(method)

    @torch.no_grad()
    def sampled(step: int, _pause: object) -> dict[str, float]:
        labels = Labels().batch(0, list(range(32)))
        both = (draw_sample(roles[n], sampler, Draws(0, -2, range(32)), (6,), labels) for n in ("student", "teacher"))
        return beside(*both)

    return make_loop(method, chosen, on_samples=sampled)


def pulled(to: float) -> Callable[[Dmd2], None]:
    """The student's gradient leads to this multiple of its sample, whatever the teacher says."""

    def spoil(method: Dmd2) -> None:
        method.matching = lambda x0, _batch, _called_at: ((x0 - to * x0) / x0.numel(), {})

    return spoil


def frozen(method: Dmd2) -> None:
    method.matching = lambda x0, _batch, _called_at: (torch.zeros_like(x0), {})


#: What is done, and the kinds of trouble that are said of it.
PROVOKED = {
    "a learning rate that is far too high": (toy_loop, {"lr": 1.0, "critic_lr": 1e-3}, {"explosion"}),
    "learning rates that are far too high": (toy_loop, {"lr": 1.0, "critic_lr": 1.0}, {"far out"}),
    "a critic's learning rate that is far too high": (toy_loop, {"critic_lr": 3.0}, {"lagging"}),
    "a critic that does not learn": (toy_loop, {"critic_lr": 0.0}, {"standstill"}),
    "a student without a gradient": (lambda out, **s: toy_loop(out, frozen, **s), {}, {"standstill"}),
    "a student without a learning rate": (toy_loop, {"lr": 0.0, "critic_lr": 1e-3}, {"standstill"}),
    "samples that fall to one": (
        lambda out, **s: toy_loop(out, pulled(0), "sample", **s),
        {"lr": 2e-2, "max_steps": 200},
        {"constant", "alike"},
    ),
    "samples that are driven out": (lambda out, **s: toy_loop(out, pulled(2), **s), {"lr": 2e-2}, {"far out"}),
}


@pytest.mark.parametrize("case", PROVOKED)
def test_a_run_that_goes_wrong_is_told_in_words(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start, settings, kinds = PROVOKED[case]
    with caplog.at_level(logging.WARNING, "fewstep"):
        start(tmp_path, **settings).run()
    found = [one for one, _ in judged(rows(tmp_path))]
    assert kinds <= {one.kind for one in found}, [one.words for one in found]
    assert {one.words for one in found} <= set(caplog.messages), "the run said what its log says"
    assert all("\n" not in one.words and one.good < one.since for one in found)


def test_a_healthy_run_raises_no_alarm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fewstep"):
        toy_loop(tmp_path).run()
    assert judged(rows(tmp_path)) == [] and not caplog.messages


# --- what follows ----------------------------------------------------------------------------------------------------


def test_a_collapse_ends_a_run_that_is_to_end_on_it(tmp_path: Path) -> None:
    loop = toy_loop(tmp_path, pulled(2), lr=2e-2, stop_on="collapse")
    with pytest.raises(UserError, match=r"over-saturated.*--resume --rollbacks 1") as caught:
        loop.run()
    assert "\n" not in str(caught.value) and loop.step < 120


def test_a_collapse_goes_back_to_before_it_and_a_lower_learning_rate_may_be_enough(tmp_path: Path) -> None:
    def restless(method: Dmd2) -> None:
        """Learns well, but at a learning rate above 0.01 not from step 60 on."""
        well = method.matching
        pulled(3)(method)
        badly = method.matching
        method.matching = lambda x0, b, at: (badly if b.draws.step >= 60 and too_fast() else well)(x0, b, at)

    def too_fast() -> bool:
        return loop.optimizers["student"].slowed * loop.config.lr > 0.01

    settings = {"lr": 3e-2, "critic_lr": 1e-3, "stop_on": "collapse", "rollbacks": 3, "checkpoints_total_limit": 4}
    loop = toy_loop(tmp_path, restless, max_steps=160, **settings)
    loop.run()
    noted = json.loads((tmp_path / "checkpoints" / "rollbacks.json").read_text())
    assert len(noted) == 2 and all(one["to"] <= 60 < one["from"] for one in noted), noted
    assert loop.step == 160 and loop.watch.slowed == 0.25
    steps = [row["step"] for row in rows(tmp_path)]
    assert steps == sorted(set(steps)) and judged(rows(tmp_path)) == []


def test_what_stands_still_is_not_gone_back_from(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the critic stands still"):
        toy_loop(tmp_path, critic_lr=0.0, stop_on="collapse", rollbacks=5).run()
    assert not (tmp_path / "checkpoints" / "rollbacks.json").exists()


def test_a_run_ends_where_no_checkpoint_from_before_is_kept(tmp_path: Path) -> None:
    settings = {"stop_on": "collapse", "rollbacks": 1, "checkpointing_steps": 1, "checkpoints_total_limit": 1}
    with pytest.raises(UserError, match="over-saturated"):
        toy_loop(tmp_path, pulled(2), lr=2e-2, **settings).run()


class BadBatch(TinyMethod):
    """One batch of the run's own draws has a gradient that is not finite."""

    def turns(self, step, batch):
        self.poison = ("critic", 0) if (batch.draws.seed, step) == (0, 7) else None
        yield from super().turns(step, batch)


@pytest.mark.parametrize("ends", [[5, 12], [9, 12], [6, 8, 10, 12]])
def test_a_run_that_was_rolled_back_and_resumed_is_the_undisturbed_one(tmp_path: Path, ends: list[int]) -> None:
    settings = {"rollbacks": 1, "checkpointing_steps": 2, "log_steps": 3, "ema_decay": 0.9}
    methods = {}
    for name, lengths in {"whole": [12], "parts": ends}.items():
        for length in lengths:
            methods[name] = BadBatch(ema=True)
            loop = make_loop(methods[name], config(tmp_path / name, max_steps=length, **settings))
            if checkpoint.steps_in(loop.checkpoints):
                loop.resume()
            loop.run()
    assert json.loads((tmp_path / "parts" / "checkpoints" / "rollbacks.json").read_text())[0]["to"] == 6
    for name in ("student", "critic", "ema"):
        assert torch.equal(*(weights(method.roles[name]) for method in methods.values()))
    assert loop.optimizers["critic"].rule.lr == 5e-4


# --- the words -------------------------------------------------------------------------------------------------------


def log(name: str, *values: float, every: int = 10) -> list[dict[str, float]]:
    return [{"step": every * k, name: value} for k, value in enumerate(values, 1)]


def grids(*values: tuple[float, float, float]) -> list[dict[str, float]]:
    names = ("std", "within", "between")
    theirs = {f"samples/teacher_{name}": 1.0 for name in names}
    both = [{f"samples/student_{n}": v for n, v in zip(names, row, strict=True)} | theirs for row in values]
    return [{"step": 100 * k, "samples/apart": k, **row} for k, row in enumerate(both, 1)]


def wavering(level: float) -> list[float]:
    """Twenty looks whose noise is about 0.1."""
    return [level + 0.1 * math.sin(2.3 * k) for k in range(20)]


def with_critic(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{**row, "critic/denoising": 1.0} for row in lines]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (grids((1, 1, 1), (1, 0.09, 1), (1, 0.09, 1)), "since step 200 each sample of the student is nearly of one"),
        (with_critic(grids((1, 0.09, 1), (1, 0.09, 1))), "since step 100 each sample of the student is nearly of one"),
        (grids(*[(1, 1, 1)], *[(1, 1, 0.04)] * 70), "since step 7000 the student's samples are nearly all alike"),
        (grids((1, 1, 1), (1, 1, 0.05), (1, 1, 0.04)), "since step 200 the student's samples are nearly all alike"),
        (grids((2.1, 1, 1), (2.5, 1, 1)), "over-saturated: their standard deviation is 2.5, the teacher's 1"),
        (
            log("critic/denoising", *[1.0] * 9, *[11.0] * 3),
            "critic/denoising explodes: it is about 11, and was about 1",
        ),
        (log("critic_2/gradient_norm", *[0.5] * 9, *[51.0] * 3), "since step 100 critic_2/gradient_norm explodes"),
        (log("student/gradient_norm", *[0.0] * 5), "since step 10 the student learns nothing: its gradient is zero"),
        (log("critic/lag", *[1.0] * 5), "since step 10 the critic stands still: it says what the teacher says"),
        (
            log("student/unrewarded_clip", *wavering(31.0), *wavering(30.2)),
            "since step 360 the student is rewarded at the cost of what is not: student/unrewarded_clip is about 30.2",
        ),
        (log("student/pair_diversity", *[0.4 - 0.01 * k for k in range(12)]), "student/pair_diversity is about 0.31"),
        (log("student/matching", 1.0, float("nan")), "student/matching is nan in step 20, and not a finite number"),
    ],
)
def test_what_is_wrong_is_said_with_its_numbers_and_since_when(lines: list[dict[str, float]], words: str) -> None:
    (one,) = troubles(History(lines))
    assert words in one.words


@pytest.mark.parametrize(
    "lines",
    [
        with_critic(grids((1, 0.05, 0.05), (1, 0.07, 0.08))),  # blurred as at the start, and better with every grid
        grids((1, 0.01, 0.01), *[(1, 0.005, 0.01)] * 20),  # a one-step student of a rectified flow, for long
        grids((4, 1, 1), (3, 1, 1)),
        grids((1, 0.05, 1)),  # one grid is chance
        log("critic/denoising", *[1.0] * 9, *[9.0] * 9),
        log("critic/denoising", *[1.0] * 9, 500.0, 1.0, 700.0, 1.0),  # single batches
        log("critic/lag", *[0.999] * 9, *[1.9] * 20),
        log("critic/lag", float("inf")),
        log("student/unrewarded_clip", *wavering(31.0), *wavering(30.9)),
        log("student/unrewarded_clip", *wavering(30.0), *wavering(31.0)),
        log("student/pair_diversity", *[0.4] * 20, *[0.37] * 20),  # by less than a tenth
        log("student/unrewarded_clip", *[31.0] * 4, *[20.0] * 4),  # too few looks
        log("student/gradient_norm", 0.0, *[1.0] * 9),
        with_critic(log("student/gradient_norm", *[1e-4] * 9, *[1.0] * 9)),
    ],
)
def test_what_healthy_runs_show_too_is_not_said(lines: list[dict[str, float]]) -> None:
    assert judged(lines) == []


def test_what_passed_is_told_with_its_end() -> None:
    values = [1.0] * 10 + [20.0] * RECENT + [1.0] * RECENT
    ((one, over),) = judged(log("critic/denoising", *values, every=1))
    assert (one.since, one.good, over) == (11, 10, 18)


def test_the_command_reads_a_log_and_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = log("critic/lag", *[1.0] * 5)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines) + '{"step": 60, "cri')
    assert len(read_log(tmp_path / "metrics.jsonl")) == 5
    assert main(["verdict", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert "since step 10 the critic stands still" in out and "1 thing is wrong" in err
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "critic/lag": 0.9}) + "\n")
    assert main(["verdict", str(tmp_path)]) == 0
    assert "nothing is wrong after 1 step" in capsys.readouterr().out
    assert main(["verdict", str(tmp_path / "nowhere")]) == 2


def test_the_command_waits_for_no_import_of_torch(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "critic/lag": 0.9}) + "\n")
    code = (
        "import sys; from fewstep.cli import main; print(main(sys.argv[1:]), {'torch', 'diffusers'} & set(sys.modules))"
    )
    words = [sys.executable, "-c", code, "verdict", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["nothing is wrong after 1 step", "0 set()"], done.stderr
