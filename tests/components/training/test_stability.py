"""The loop when training is unstable: skipped updates, divergence, rollbacks, and no waiting for the device."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.training.feed import Batches
from modelmill.components.training.loop import TrainingLoop
from modelmill.components.training.worker import StopRequestedError
from tests.components.training.runs import digest, history, make_loop, single_rank
from tests.components.training.samples import make_tokens, training_config
from tests.components.training.test_monitor import NoHostReads

NAN, INF = float("nan"), float("inf")
Distortion = Callable[[TrainingLoop, torch.Tensor, torch.nn.Module], torch.Tensor]


@pytest.fixture
def tokens(home: object, tmp_path: Path) -> Manifest:
    return make_tokens(tmp_path / "tokens")


class Recorded:
    """Another source's batches, and which of them were asked for."""

    def __init__(self, source: Batches, shift: Callable[[int], int]) -> None:
        self.source, self.shift, self.asked = source, shift, list[int]()

    def batch(self, step: int, rank: int, world: int) -> np.ndarray:
        self.asked.append(self.shift(step))
        return self.source.batch(self.shift(step), rank, world)


class Run:
    """A loop on one rank whose loss is distorted; keeps the state's bits after each update."""

    def __init__(
        self, tokens: Manifest, scratch: Path, distort: Distortion, *, stop_in: int | None = None, **changes: Any
    ) -> None:
        config = training_config(**{"parallel": {"processes_per_node": 1}, "validate_every": None, **changes})
        self.loop = make_loop(tokens, config, single_rank(scratch), dtype=torch.float64, stop_in=stop_in)
        self.scratch = scratch
        self.batches = self.read(lambda step: step)
        self.states: dict[int, list[torch.Tensor]] = {0: self.state()}
        self.loop.objective = lambda model, rows: distort(self.loop, model(rows[:, :-1], rows[:, 1:]), model)
        train_step = self.loop._train_step

        def watched(*batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
            result = train_step(*batch)
            self.states[self.loop.progress.step] = self.state()
            return result

        self.loop._train_step = watched  # type: ignore[method-assign]

    def read(self, shift: Callable[[int], int]) -> Recorded:
        """Have every step get the batch of another."""
        batches = Recorded(self.loop.data.batches, shift)
        self.loop.data = replace(self.loop.data, batches=batches)
        return batches

    def state(self) -> list[torch.Tensor]:
        parameters = list(self.loop.model.parameters())
        state = [value for p in parameters for _, value in sorted(self.loop.optimizer.state[p].items())]
        return [tensor.detach().clone() for tensor in (*parameters, *state)]

    def changed(self, step: int) -> bool:
        """Whether the update of a step, from 1, changed any bit of weights, moments and step counters."""
        before, after = self.states[step - 1], self.states[step]
        assert all(tensor.isfinite().all() for tensor in after)
        return len(before) != len(after) or not all(map(torch.equal, before, after))

    def history(self, key: str = "loss") -> list[dict[str, Any]]:
        return [record for record in history(self.scratch) if key in record]


def undisturbed(loop: TrainingLoop, loss: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    return loss


def at_step(steps: set[int], change: Callable[[torch.Tensor, torch.nn.Module], torch.Tensor]) -> Distortion:
    """Change the losses of some steps, from 1."""
    return lambda loop, loss, model: change(loss, model) if loop.progress.step + 1 in steps else loss


def in_batch(batches: set[int], factor: float) -> Distortion:
    """Scale the losses of some batches, from 0, wherever in the run they come."""
    return lambda loop, loss, _: loss * factor if loop.progress.cursor in batches else loss


def infinite_first_micro_batch() -> Distortion:
    """In step 5 the first micro-batch's loss is infinite and its gradient finite; the others are sound."""
    done: list[TrainingLoop] = []

    def distort(loop: TrainingLoop, loss: torch.Tensor, _: torch.nn.Module) -> torch.Tensor:
        if loop.progress.step != 4 or loop in done:
            return loss
        done.append(loop)
        return loss + INF

    return distort


BAD: dict[str, Distortion] = {
    "nan loss": at_step({5}, lambda loss, _: loss * NAN),
    "infinite loss": at_step({5}, lambda loss, _: loss * INF),
    "nan gradient of a finite loss": at_step(
        {5}, lambda loss, model: loss + (next(model.parameters()).sum() * 0).sqrt()
    ),
    "infinite loss of one micro-batch with a finite gradient": infinite_first_micro_batch(),
}


@pytest.mark.parametrize("clip_norm", [1.0, None])
@pytest.mark.parametrize("bad", list(BAD))
def test_what_is_not_finite_changes_nothing_and_training_goes_on(
    bad: str, clip_norm: float | None, tokens: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tokens, tmp_path / "run", BAD[bad], log_every=4, checkpoint_every=None, clip_norm=clip_norm)
    with caplog.at_level(logging.WARNING, logger="modelmill"):
        metrics = run.loop.run()
    assert [step for step in range(1, 9) if not run.changed(step)] == [5]  # between the logged steps 4 and 8
    assert "skipped the update of step 5: an infinite or nan loss or gradient" in caplog.text
    assert run.history("skipped") == [{"step": 5, "skipped": "nonfinite"}]
    assert [(record["step"], record["skipped_steps"]) for record in run.history()] == [(1, 0), (4, 0), (8, 1)]
    assert np.isfinite(list(metrics.values())).all()


def test_a_logged_step_that_is_not_finite_leaves_a_gap(tokens: Manifest, tmp_path: Path) -> None:
    run = Run(tokens, tmp_path / "run", BAD["nan loss"], checkpoint_every=None)
    run.loop.run()
    record = run.history("skipped_steps")[4]
    assert record["step"] == 5
    assert not {"loss", "grad_norm"} & record.keys()
    assert record["param_norm"] == run.history("skipped_steps")[3]["param_norm"] > 0
    json.loads((tmp_path / "run" / "history.jsonl").read_text().splitlines()[5], parse_constant=pytest.fail)


def test_the_parameter_norm_is_that_of_all_weights_after_the_step(tokens: Manifest, tmp_path: Path) -> None:
    run = Run(tokens, tmp_path / "run", undisturbed)
    run.loop.run()
    weights = torch.cat([parameter.detach().flatten() for parameter in run.loop.model.parameters()])
    assert run.history()[-1]["param_norm"] == pytest.approx(weights.norm().item(), rel=1e-12)


def test_a_run_that_stays_not_finite_ends_and_its_checkpoint_is_sound(tokens: Manifest, tmp_path: Path) -> None:
    options: dict[str, Any] = {"log_every": 8, "stability": {"max_nonfinite_steps": 3}, "clip_norm": None}
    lasting = at_step(set(range(5, 9)), lambda loss, _: loss * NAN)
    run = Run(tokens, tmp_path / "run", lasting, **options)
    message = (
        r"training\.learning_rate: .* infinite or nan at step 5 and was so for 4 steps in a row, at learning rate"
        r" 0\.00.*; lower training\.learning_rate or raise"
    )
    with pytest.raises(UserError, match=message):
        run.loop.run()
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-00000003",
        "step-00000006",
    ]
    again = Run(tokens, tmp_path / "run", undisturbed, **options)
    again.loop.run()
    assert again.loop.progress.step == 8
    assert all(parameter.isfinite().all() for parameter in again.loop.model.parameters())
    # Fewer in a row are no divergence, even when nothing is looked at in between ...
    other = at_step({2, 3, 5, 6}, lambda loss, _: loss * NAN)
    Run(tokens, tmp_path / "other", other, **options, checkpoint_every=None).loop.run()
    # ... unless the whole run is no longer than that.
    with pytest.raises(UserError, match="at step 1 and was so for 2 steps"):
        Run(tokens, tmp_path / "short", at_step({1, 2}, lambda loss, _: loss * NAN), **options, steps=2).loop.run()


def test_skipped_spikes_leave_the_weights_as_they_are(tokens: Manifest, tmp_path: Path) -> None:
    stability = {"action": "skip_step", "window": 3, "spike_margin": 5.0, "max_spike_steps": 2}
    spikes = {2, 6, 9, 10, 11}  # the first before the window is full, the last one step too long
    options: dict[str, Any] = {"steps": 14, "stability": stability, "checkpoint_every": None, "log_every": 7}
    run = Run(tokens, tmp_path / "run", at_step(spikes, lambda loss, _: loss * 100), **options)
    run.loop.run()
    assert [step for step in range(1, 15) if not run.changed(step)] == [6, 9, 10]
    assert [(r["step"], r["skipped"]) for r in run.history("skipped")] == [(6, "spike"), (9, "spike"), (10, "spike")]
    assert [(r["spike_start"], r["spike_length"]) for r in run.history("spike_start")] == [(6, 1), (9, 3)]
    plain = Run(tokens, tmp_path / "plain", undisturbed, **{**options, "stability": {}})
    plain.loop.run()
    assert all(plain.changed(step) for step in range(1, 15))


ROLLBACK = {"action": "rollback", "window": 3, "spike_margin": 5.0, "rollback_skip_batches": 2}
# Batch 7 spikes in step 8: the run goes back to step 6, whose next batch was 6, and skips 6 and 7.
OPTIONS: dict[str, Any] = {"steps": 12, "checkpoint_every": 3, "stability": ROLLBACK}
SPIKING = in_batch({7}, 1000.0)


def test_a_rollback_goes_on_before_the_spike_with_batches_after_it(
    tokens: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tokens, tmp_path / "run", SPIKING, **OPTIONS)
    with caplog.at_level(logging.WARNING, logger="modelmill"):
        run.loop.run()
    assert "rollback 1 from step 8 to step 6, on with batch 8: gradient norm" in caplog.text
    assert run.batches.asked == [*range(9), *range(8, 14)]  # batch 8 was fetched ahead of step 9 and not used
    assert [record["step"] for record in run.history()] == list(range(1, 13))
    assert run.history("cursor") == [{"step": 6, "rollbacks": 1, "cursor": 8, "alarm_step": 8}]
    progress = run.loop.progress
    assert (progress.step, progress.cursor, progress.rollbacks) == (12, 14, 1)
    # It is the run that never saw batches 6 and 7.
    other = Run(tokens, tmp_path / "other", undisturbed, **OPTIONS)
    other.read(lambda step: step + 2 * (step >= 6))
    other.loop.run()
    assert digest(run.loop.model) == digest(other.loop.model)
    assert run.history() == other.history()


@pytest.mark.parametrize("interruption", ["stopped after the rollback", "killed after the rollback"])
def test_a_run_resumed_after_a_rollback_ends_with_the_same_bits(
    interruption: str, tokens: Manifest, tmp_path: Path
) -> None:
    whole = Run(tokens, tmp_path / "whole", SPIKING, **OPTIONS)
    whole.loop.run()
    if interruption == "stopped after the rollback":
        first = Run(tokens, tmp_path / "parts", SPIKING, stop_in=12, **OPTIONS)
        with pytest.raises(StopRequestedError, match=r"after step 1[01]"):
            first.loop.run()
    else:

        def kill(loop: TrainingLoop, loss: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
            if loop.progress.rollbacks and loop.progress.step == 7:
                raise KeyboardInterrupt
            return SPIKING(loop, loss, model)

        first = Run(tokens, tmp_path / "parts", kill, **OPTIONS)
        with pytest.raises(KeyboardInterrupt):
            first.loop.run()
    assert first.loop.progress.rollbacks == 1
    again = Run(tokens, tmp_path / "parts", SPIKING, **OPTIONS)
    again.loop.run()
    assert again.loop.progress.rollbacks == 1
    assert digest(again.loop.model) == digest(whole.loop.model)
    assert (tmp_path / "parts/history.jsonl").read_bytes() == (tmp_path / "whole/history.jsonl").read_bytes()


def test_before_the_first_checkpoint_a_run_goes_back_to_its_start(tokens: Manifest, tmp_path: Path) -> None:
    options = {**OPTIONS, "checkpoint_every": 100}
    run = Run(tokens, tmp_path / "run", in_batch({4}, 1000.0), **options)
    run.loop.run()
    assert run.history("cursor") == [{"step": 0, "rollbacks": 1, "cursor": 5, "alarm_step": 5}]
    other = Run(tokens, tmp_path / "other", undisturbed, **options)
    other.read(lambda step: step + 5)
    other.loop.run()
    assert digest(run.loop.model) == digest(other.loop.model)


def test_steps_that_stay_not_finite_are_rolled_back_too(tokens: Manifest, tmp_path: Path) -> None:
    stability = {**ROLLBACK, "max_nonfinite_steps": 2, "rollback_skip_batches": 6}
    run = Run(tokens, tmp_path / "run", in_batch({7, 8, 9}, NAN), **{**OPTIONS, "stability": stability})
    run.loop.run()
    assert run.history("cursor") == [{"step": 6, "rollbacks": 1, "cursor": 12, "alarm_step": 9}]
    assert [record["step"] for record in run.history()] == list(range(1, 13))


def test_no_checkpoint_is_written_inside_a_spike(tokens: Manifest, tmp_path: Path) -> None:
    stability = {**ROLLBACK, "spike_margin": 0.5, "alarm_ratio": 1e6}  # a spike that is no alarm
    options = {**OPTIONS, "stability": stability}
    run = Run(tokens, tmp_path / "run", at_step({6, 12}, lambda loss, _: loss * 10), **options)
    run.loop.run()
    assert [record["step"] for record in run.history("spike_start")] == [7]
    # Of steps 3, 6, 9 and 12 the sixth is missing; the last is always kept.
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000009", "step-00000012"]
    early = Run(tokens, tmp_path / "early", at_step({6}, lambda loss, _: loss * 10), stop_in=8, **options)
    with pytest.raises(StopRequestedError):
        early.loop.run()
    kept = {path.name for path in (tmp_path / "early/checkpoints").iterdir()}
    assert "step-00000003" in kept
    assert "step-00000006" not in kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"stability": {"action": "rollback"}, "checkpoint_every": None},
            "stability.action rollback goes back to checkpoints, and checkpoint_every is null; set",
        ),
        ({"stability": {"action": "restart"}}, "stability.action\n  Input should be 'log', 'skip_step' or 'rollback'"),
        ({"stability": {"window": 1}}, "stability.window\n  Input should be greater than or equal to 2"),
        ({"stability": {"alarm_ratio": 1}}, "stability.alarm_ratio\n  Input should be greater than 1"),
        ({"stability": {"spike_margin": INF}}, "stability.spike_margin\n  Input should be a finite number"),
    ],
)
def test_a_wrong_section_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        training_config(**changes)


def test_too_many_rollbacks_end_the_run(tokens: Manifest, tmp_path: Path) -> None:
    always = at_step({8}, lambda loss, _: loss * 1000)  # whatever the batch
    run = Run(tokens, tmp_path / "run", always, **{**OPTIONS, "stability": {**ROLLBACK, "max_rollbacks": 2}})
    message = r"^training\.stability\.max_rollbacks: 2 rollbacks did not help: gradient norm .* at step 8 .*; lower"
    with pytest.raises(UserError, match=message):
        run.loop.run()
    assert [record["rollbacks"] for record in run.history("cursor")] == [1, 2]
    assert run.loop.progress.cursor == 6 + 2 + 2 + 2


def test_without_a_sound_checkpoint_there_is_no_way_back(tokens: Manifest, tmp_path: Path) -> None:
    def distort(loop: TrainingLoop, loss: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
        if loop.progress.step == 7:
            shutil.rmtree(tmp_path / "run/checkpoints", ignore_errors=True)
        return SPIKING(loop, loss, model)

    with pytest.raises(UserError, match=r"^checkpoints: no sound one is left .* gradient norm .*; start"):
        Run(tokens, tmp_path / "run", distort, **OPTIONS).loop.run()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fails when a training step reads a value from a tensor; what is read outside steps is listed."""
    inside: list[bool] = []
    found: list[str] = []
    step = TrainingLoop._train_step

    def guarded(loop: TrainingLoop, *batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        inside.append(True)
        with NoHostReads():
            result = step(loop, *batch)
        inside.clear()
        return result

    for name in ("tolist", "numpy"):
        original = getattr(torch.Tensor, name)

        def reading(tensor: torch.Tensor, name: str = name, original: Any = original) -> Any:
            assert not inside, f"Tensor.{name} waits for the device"
            found.append(name)
            return original(tensor)

        monkeypatch.setattr(torch.Tensor, name, reading)
    monkeypatch.setattr(TrainingLoop, "_train_step", guarded)
    return found


@pytest.mark.parametrize(
    "stability", [{}, {"action": "skip_step", "window": 2, "spike_margin": 9.0, "loss_spike": 99.0}]
)
def test_nothing_inside_a_step_waits_for_the_device(
    stability: dict[str, Any], tokens: Manifest, tmp_path: Path, reads: list[str]
) -> None:
    options = {"stability": stability, "log_every": 4, "checkpoint_every": None, "validation_rows": 0}
    run = Run(tokens, tmp_path / "run", BAD["nan loss"], **options)

    # Plain cross entropy: ours counts, on the CPU only, whether all targets count.
    def objective(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        return BAD["nan loss"](run.loop, loss, model)

    run.loop.objective = objective
    run.loop._train_step = TrainingLoop._train_step.__get__(run.loop)  # type: ignore[method-assign]
    run.loop.run()
    assert run.history("skipped") == [{"step": 5, "skipped": "nonfinite"}]
    # Steps 1, 4 and 8 are logged, each with a read of the monitor and one of loss and norms; the last is saved.
    assert reads.count("tolist") >= 6
