"""The stability monitor on synthetic series: spikes, alarms, the running mean, and what is skipped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modelmill.components.training.monitor import Findings, StabilityMonitor
from modelmill.components.training.options import StabilityConfig

NAN, INF = float("nan"), float("inf")


def monitor(**changes: Any) -> StabilityMonitor:
    return StabilityMonitor(StabilityConfig.model_validate(changes), torch.device("cpu"))


def feed(watch: StabilityMonitor, norms: list[float], losses: list[float] | None = None, start: int = 1) -> list[int]:
    """Observe one step after another; returns the steps whose update must not happen."""
    skipped = []
    for index, norm in enumerate(norms):
        loss = None if losses is None else torch.tensor(losses[index])
        flag = watch.observe(start + index, torch.tensor(norm), loss)
        assert (flag.dtype, flag.shape) == (torch.float32, ())  # what a fused optimizer takes
        if flag.item() == 1.0:
            skipped.append(start + index)
        else:
            assert flag.item() == 0.0
    return skipped


def planted(length: int, spikes: dict[int, float], base: float = 1.0) -> list[float]:
    """Norms of steps 1, 2, ...: the base, with other values at some steps."""
    return [spikes.get(step, base) for step in range(1, length + 1)]


def spikes_of(found: Findings) -> list[tuple[int, int]]:
    """Start and length of the spikes that have ended."""
    return [(event["spike_start"], event["spike_length"]) for event in found.events if "spike_start" in event]


def reference_spikes(norms: list[float], window: int = 20, margin: float = 0.1) -> list[tuple[int, int]]:
    """The article's definition, written once more: start and length of each spike that ends."""
    found, length = [], 0
    for step in range(window + 1, len(norms) + 1):
        if norms[step - 1] > np.mean(norms[step - 1 - window : step - 1]) + margin:
            length += 1
        elif length:
            found.append((step - length, length))
            length = 0
    return found


def test_planted_spikes_are_found_at_their_steps_with_their_lengths() -> None:
    watch = monitor()
    norms = planted(60, {25: 1.5, 32: 1.4, 33: 1.4, 34: 1.4, 50: 1.2})
    assert feed(watch, norms) == []  # the default only logs
    found = watch.look()
    assert spikes_of(found) == [(25, 1), (32, 3), (50, 1)]
    assert [event["step"] for event in found.events] == [26, 35, 51]
    assert watch.series()["spikes"] == 3
    assert watch.series()["spike_length"] == 1
    assert found.alarm is None
    assert watch.look() == Findings()  # told once


def test_a_random_series_has_the_spikes_of_the_definition() -> None:
    generator = np.random.default_rng(3)
    norms = (1 + 0.12 * generator.standard_normal(400)).astype(np.float32).tolist()
    watch = monitor(max_spike_steps=400)
    feed(watch, norms)
    expected = reference_spikes(norms)
    assert len(expected) > 20
    assert spikes_of(watch.look()) == expected


@pytest.mark.parametrize(("norm", "spike"), [(1.09, False), (1.11, True)])
def test_the_margin_is_absolute(norm: float, spike: bool) -> None:
    for base in (0.0, 4.0):  # around 1 and around 5
        watch = monitor()
        feed(watch, [value + base for value in planted(30, {25: norm})])
        assert spikes_of(watch.look()) == ([(25, 1)] if spike else [])


@pytest.mark.parametrize("window", [4, 20])
def test_there_is_no_spike_before_the_window_is_full(window: int) -> None:
    watch = monitor(window=window)
    feed(watch, planted(window, {window: 9.0}))
    assert watch.look().alarm is None
    assert not watch.in_spike
    watch = monitor(window=window)
    feed(watch, planted(window + 1, {window + 1: 9.0}))
    assert watch.look().alarm is not None
    assert watch.in_spike


def test_the_mean_is_of_the_last_updates_before_the_step() -> None:
    watch = monitor(window=4, spike_margin=100)
    norms = [3.0, 1.0, 2.0, 5.0, 8.0, 13.0]
    for step, norm in enumerate(norms, start=1):
        feed(watch, [norm], start=step)
        watch.look()
        before = norms[max(0, step - 5) : step - 1]
        assert watch.series().get("grad_norm_mean") == (pytest.approx(np.mean(before)) if before else None)
        assert watch.series()["lowest_grad_norm"] == min(norms[:step])


def test_the_alarm_is_three_times_the_lowest_norm_so_far() -> None:
    watch = monitor(spike_margin=100)
    feed(watch, planted(40, {3: 0.5, 30: 1.49}))
    assert watch.look().alarm is None
    feed(watch, [1.51, 1.0, 2.0], start=41)
    assert watch.look().alarm == "gradient norm 1.51 at step 41 is more than alarm_ratio 3 x the lowest so far, 0.5"
    assert watch.series()["alarms"] == 2


def test_a_spike_that_does_not_settle_is_an_alarm() -> None:
    watch = monitor(max_spike_steps=3)
    feed(watch, planted(33, {31: 1.8, 32: 1.8, 33: 1.8}))
    assert watch.look().alarm is None
    feed(watch, [1.8], start=34)
    assert watch.look().alarm == "at step 34 a spike has lasted 4 steps, since step 31"


def test_what_is_not_finite_is_skipped_and_poisons_nothing() -> None:
    watch = monitor()
    norms = planted(40, {1: NAN, 10: INF, 25: 1.5, 26: NAN, 27: 1.5, 30: NAN})
    assert feed(watch, norms) == [1, 10, 26, 30]
    found = watch.look()
    assert [event for event in found.events if "skipped" in event] == [
        {"step": step, "skipped": "nonfinite"} for step in (1, 10, 26, 30)
    ]
    assert spikes_of(found) == [(25, 2)]  # the step between belongs to neither side
    assert (found.nonfinite_start, found.nonfinite_steps) == (1, 1)
    assert watch.series()["skipped_steps"] == 4
    # Step 25 entered the mean, steps 26 and 30 did not.
    assert watch.series()["grad_norm_mean"] == pytest.approx((18 + 1.5 * 2) / 20)
    assert watch.series()["lowest_grad_norm"] == 1.0


def test_steps_in_a_row_that_are_not_finite_are_counted_over_looks() -> None:
    watch = monitor()
    feed(watch, [1.0, NAN, NAN])
    assert watch.look().nonfinite_steps == 2
    feed(watch, [INF, 1.0, NAN], start=4)
    found = watch.look()
    assert (found.nonfinite_start, found.nonfinite_steps) == (2, 3)
    assert watch.series().get("lowest_grad_norm") == 1.0


def test_a_skipped_spike_stays_out_of_the_mean() -> None:
    watch = monitor(action="skip_step")
    norms = planted(60, {25: 500.0, 30: 1.3, 40: 1.3, 41: 1.3})
    assert feed(watch, norms) == [25, 30, 40, 41]
    found = watch.look()
    assert spikes_of(found) == [(25, 1), (30, 1), (40, 2)]  # with 500 in the mean, the others would be hidden
    assert {event["skipped"] for event in found.events if "skipped" in event} == {"spike"}
    assert watch.series()["grad_norm_mean"] == 1.0
    plain = monitor()
    feed(plain, norms)
    assert spikes_of(plain.look()) == reference_spikes(norms) != spikes_of(found)


def test_a_lasting_shift_is_taken_after_the_longest_spike() -> None:
    watch = monitor(action="skip_step", max_spike_steps=3, alarm_ratio=50)
    norms = [1.0] * 20 + [2.0] * 40
    assert feed(watch, norms) == [21, 22, 23]
    found = watch.look()
    # From step 24 on the twos enter a mean of twenty: it comes within 0.1 of 2 once there are 18 of them.
    assert spikes_of(found) == [(21, 3 + 18)]
    assert found.alarm == "at step 24 a spike has lasted 4 steps, since step 21"
    assert watch.series()["grad_norm_mean"] == 2.0


def test_a_loss_far_above_its_spread_is_a_spike_too() -> None:
    generator = np.random.default_rng(0)
    losses = (3 + 0.01 * generator.standard_normal(40)).tolist()
    losses[29] = 3.2
    watch = monitor(loss_spike=6.0, action="skip_step")
    assert feed(watch, [1.0] * 40, losses) == [30]
    assert spikes_of(watch.look()) == [(30, 1)]
    assert feed(monitor(action="skip_step"), [1.0] * 40, losses) == []
    assert feed(monitor(loss_spike=6.0), [1.0] * 2, [3.0, NAN]) == [2]
    with pytest.raises(ValueError, match="loss_spike"):
        watch.observe(41, torch.tensor(1.0))


@pytest.mark.parametrize("action", ["log", "skip_step"])
@pytest.mark.parametrize("cut", [7, 26, 32])
def test_a_saved_state_goes_on_where_it_was(action: str, cut: int) -> None:
    """Also in the middle of a spike, or of steps that are not finite."""
    norms = planted(60, {5: NAN, 25: 1.5, 26: 1.5, 27: 1.5, 32: NAN, 33: NAN, 45: 7.0, 50: 0.2})
    losses = np.random.default_rng(1).normal(3, 0.1, 60).tolist()
    options = {"action": action, "loss_spike": 4.0}
    whole = monitor(**options)
    skipped = feed(whole, norms, losses)
    first = monitor(**options)
    before = feed(first, norms[:cut], losses[:cut])
    events = first.look().events
    second = monitor(**options)
    second.load(json.loads(json.dumps(first.state(), allow_nan=False)))
    assert before + feed(second, norms[cut:], losses[cut:], start=cut + 1) == skipped
    assert events + second.look().events == whole.look().events
    assert second.series() == whole.series()
    assert second.state() == whole.state()


def test_the_state_of_a_run_that_has_not_started() -> None:
    watch = monitor()
    assert json.loads(json.dumps(watch.state(), allow_nan=False))["norms"] == []
    assert watch.series() == {"spikes": 0, "spike_length": 0, "skipped_steps": 0, "alarms": 0}
    feed(watch, [NAN])
    watch.look()
    assert all(math.isfinite(value) for value in watch.series().values())


class NoHostReads(TorchDispatchMode):
    """Fails when a value is read from a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_host_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: object) -> None:
        raise AssertionError("waits for the device")

    monkeypatch.setattr(torch.Tensor, "tolist", refuse)
    monkeypatch.setattr(torch.Tensor, "numpy", refuse)
    with NoHostReads():
        yield


def test_a_step_is_judged_without_waiting_for_the_device(no_host_reads: None) -> None:
    watch = monitor(action="skip_step", loss_spike=6.0, window=4)
    for step, norm in enumerate([1.0, 2.0, NAN, 3.0, 4.0, 100.0, 1.0], start=1):
        watch.observe(step, torch.tensor(norm), torch.tensor(norm))
    with pytest.raises(AssertionError, match="waits for the device"):
        watch.look()  # the guard works
