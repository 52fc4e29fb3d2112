"""Searching for the best training: what is chosen, what is given up, and that an end in the middle changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelmill.components.core.errors import UserError
from modelmill.components.core.events import read_lines
from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest
from modelmill.components.forecasting import search_chronos as steps
from modelmill.components.forecasting.search_config import SearchConfig
from modelmill.components.forecasting.search_storage import STORAGE_VARIABLE
from modelmill.components.training.launch import RankFailedError, TrainingStoppedError
from modelmill.components.training.processes import available_cores
from tests.components.conftest import RunFolder
from tests.components.forecasting import searches
from tests.components.forecasting.searches import BASE_VALUE, Trainings, loss, run, section, told

SEGMENTS = {"segments": 2, "startup_trials": 2}


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trainings]:
    monkeypatch.delenv(STORAGE_VARIABLE, raising=False)
    with Trainings() as made:
        yield made


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Manifest]:
    return searches.inputs(tmp_path / "inputs")


class TestWhatIsChosen:
    def test_the_best_trial_on_the_validation_windows(
        self, trainings: Trainings, given: dict[str, Manifest], tmp_path: Path
    ) -> None:
        found = run(tmp_path / "a", section(), **given)
        trials = told(found)["trials"]
        assert [trial["number"] for trial in trials] == list(range(1, 7))
        rates = [trial["params"]["learning_rate"] for trial in trials]
        assert len(set(rates)) == 6
        assert all(1e-5 <= rate <= 1e-4 for rate in rates), "the default of the requirement"
        best = min(trials, key=lambda trial: trial["value"])
        assert best["value"] == loss(best["params"]["learning_rate"], 8)
        assert found.metadata["trial"] == best["number"]
        assert found.metadata["params"] == best["params"]
        assert (found.metadata["winner"], found.metadata["method"]) == ("trial", "full")
        assert found.metrics == {"validation_sql": best["value"], "zero_shot_validation_sql": BASE_VALUE}
        assert found.metadata["weights_digest"] == best["digest"]
        assert found.counts == {"trials": 6, "complete": 6, "pruned": 0, "failed": 0, "lost": 0}
        kept = {entry.path for entry in found.files if entry.path.startswith("trials/")}
        assert kept == {f"trials/{number:03d}/data/history.jsonl" for number in range(1, 7)}, "no weights of losers"

    def test_equal_inputs_give_equal_bytes_and_another_seed_other_values(
        self, trainings: Trainings, given: dict[str, Manifest], tmp_path: Path
    ) -> None:
        found = [run(tmp_path / str(seed), section(seed=seed % 10), **given) for seed in (1, 11, 2)]
        assert found[0].digest == found[1].digest
        assert found[0].metadata["params"] != found[2].metadata["params"]

    def test_a_base_that_no_trial_beats_is_the_result(
        self, trainings: Trainings, given: dict[str, Manifest], tmp_path: Path
    ) -> None:
        trainings.values[0] = -1.0
        found = run(tmp_path / "a", section(max_jobs=2), **given)
        assert (found.metadata["winner"], found.metadata["method"], found.metadata["trial"]) == (
            "base",
            "zero-shot",
            0,
        )
        assert found.metadata["weights_digest"] == given["base"].metadata["weights_digest"]
        assert found.metrics["validation_sql"] == -1.0
        assert "No trial beats the untrained base" in found.path("report.md").read_text()
        trainings.values[0] = min(trial["value"] for trial in told(found)["trials"])
        tie = run(tmp_path / "b", section(max_jobs=2), **given)
        assert tie.metadata["winner"] == "base", "as good is not better"

    def test_trials_that_fail_do_not_end_the_search(
        self, trainings: Trainings, given: dict[str, Manifest], tmp_path: Path
    ) -> None:
        trainings.failures[2] = UserError("training.learning_rate: the loss became nan; lower it")
        trainings.failures[3] = RankFailedError("rank 0 of 1 failed: boom; the end of its log:\n  /some/path")
        trainings.failures[4] = RuntimeError("CUDA out of memory. Tried to allocate")
        trainings.values[1] = float("nan")
        found = run(tmp_path / "a", section(), **given)
        reasons = [trial["reason"] for trial in told(found)["trials"]]
        assert reasons == [
            "3 of 4 forecasts are not finite",
            "training.learning_rate: the loss became nan; lower it",
            "rank 0 of 1 failed: boom",
            "out of memory: CUDA out of memory. Tried to allocate",
            "",
            "",
        ]
        assert found.counts["failed"] == 4
        assert found.metadata["winner"] == "trial"

    def test_the_base_is_the_result_when_every_trial_fails(
        self, trainings: Trainings, given: dict[str, Manifest], tmp_path: Path
    ) -> None:
        trainings.values |= dict.fromkeys(range(1, 4), float("nan"))
        found = run(tmp_path / "a", section(max_jobs=3), **given)
        assert (found.metadata["winner"], found.counts["failed"]) == ("base", 3)
        assert "No trial of 3 came to an end" in found.path("report.html").read_text()

    def test_a_base_that_cannot_be_judged_loses(
        self, trainings: Trainings, given: dict[str, Manifest], tmp_path: Path
    ) -> None:
        trainings.values[0] = float("nan")
        found = run(tmp_path / "a", section(max_jobs=2), **given)
        assert found.metadata["winner"] == "trial"
        assert list(found.metrics) == ["validation_sql"]
        assert "could not be judged" in found.path("report.md").read_text()

    def test_a_refit_trains_the_winner_on_all_that_is_not_held_back(
        self, trainings: Trainings, given: dict[str, Manifest], tmp_path: Path
    ) -> None:
        found = run(tmp_path / "a", section(max_jobs=2, refit=True), **given)
        assert trainings.windows == [("001", 3), ("002", 3), ("refit", 2)], (
            "two windows are the backtest's, one is validation"
        )
        assert found.metadata["refit"] is True
        assert "trained again with the validation windows" in found.path("report.md").read_text()


class TestGivingUp:
    def test_a_pruned_trial_stops_training(
        self, trainings: Trainings, given: dict[str, Manifest], tmp_path: Path
    ) -> None:
        found = run(tmp_path / "a", section(pruning=SEGMENTS, max_jobs=8), **given)
        trials = told(found)["trials"]
        pruned = [trial for trial in trials if trial["state"] == "pruned"]
        assert pruned
        assert found.counts["pruned"] == len(pruned)
        for trial in trials:
            wanted = [4] if trial["state"] == "pruned" else [4, 8]
            assert [step for name, step in trainings.made if name == f"{trial['number']:03d}"] == wanted
            assert [step for step, _ in trial["course"]] == wanted
        assert found.metadata["trial"] not in [trial["number"] for trial in pruned]

    @pytest.mark.slow
    def test_hyperband_gives_up_too(self, trainings: Trainings, given: dict[str, Manifest], tmp_path: Path) -> None:
        pruning = {"segments": 4, "pruner": "hyperband"}
        found = run(tmp_path / "a", section(pruning=pruning, max_jobs=12), **given)
        assert found.counts["pruned"] > 0
        assert len(trainings.made) < 4 * 12


class Killed(BaseException):
    """Ends a search at once, as a kill would."""


class TestInterruptions:
    @pytest.mark.parametrize(
        "after", [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(7, marks=pytest.mark.slow)]
    )
    def test_a_killed_search_ends_as_an_undisturbed_one(
        self, trainings: Trainings, given: dict[str, Manifest], tmp_path: Path, after: int
    ) -> None:
        config = section(pruning=SEGMENTS, space={"steps": [8, 16]})
        whole = run(tmp_path / "whole", config, **given)
        made = list(trainings.made)
        trainings.made.clear()

        def kill(count: int) -> None:
            if count == after:
                raise Killed

        trainings.on_training = kill
        with pytest.raises(Killed):
            run(tmp_path / "cut", config, **given)
        trainings.on_training = lambda count: None
        resumed = run(tmp_path / "cut", config, **given)
        assert resumed.digest == whole.digest
        assert trainings.made[: after - 1] + trainings.made[after:] == made, "only what was cut off is trained again"

    def test_a_process_killed_hard(self, trainings: Trainings, given: dict[str, Manifest], tmp_path: Path) -> None:
        command = [sys.executable, "-m", "tests.components.forecasting.searches"]
        ends = [
            subprocess.run([*command, tmp_path / "hard", str(after)], timeout=120, check=False).returncode
            for after in (4, 0)
        ]
        assert ends == [-9, 0]
        whole = run(tmp_path / "whole", section(pruning=SEGMENTS), **given)
        for name in ("trials.json", "report.md", "model/model.safetensors"):
            assert (tmp_path / "hard" / "search" / "data" / name).read_bytes() == whole.path(name).read_bytes()

    def test_values_do_not_depend_on_when_a_search_was_prolonged(
        self, trainings: Trainings, given: dict[str, Manifest], tmp_path: Path
    ) -> None:
        whole = run(tmp_path / "whole", section(), **given)
        run(tmp_path / "short", section(max_jobs=3), **given)
        prolonged = run(tmp_path / "short", section(), **given)
        assert told(prolonged) == told(whole)
        assert prolonged.metadata == whole.metadata

    def test_a_stop_leaves_the_trial_for_later(
        self, trainings: Trainings, given: dict[str, Manifest], tmp_path: Path
    ) -> None:
        trainings.failures[2] = TrainingStoppedError("training was stopped by SIGTERM")
        with pytest.raises(TrainingStoppedError):
            run(tmp_path / "a", section(), **given)
        trainings.failures.clear()
        assert run(tmp_path / "a", section(), **given).counts["complete"] == 6

    def test_lost_weights_are_trained_again(
        self, trainings: Trainings, given: dict[str, Manifest], tmp_path: Path
    ) -> None:
        first = run(tmp_path / "a", section(), **given)
        database = (tmp_path / "a" / "search.sqlite").read_bytes()
        trainings.made.clear()
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "search.sqlite").write_bytes(database)  # as a database elsewhere that outlived the folder
        again = run(tmp_path / "b", section(), **given)
        assert trainings.made == [(f"{first.metadata['trial']:03d}", 8)]
        assert again.metadata == first.metadata

    def test_a_mistake_that_every_trial_would_meet_ends_the_search(
        self, trainings: Trainings, given: dict[str, Manifest], tmp_path: Path
    ) -> None:
        trainings.failures[1] = UserError("chronos.min_context: 16, but no series has 17 points")
        with pytest.raises(UserError, match=r"chronos\.min_context"):
            run(tmp_path / "a", section(), **given)
        assert len(trainings.made) == 1


class TestWorkers:
    def worker(self, folder: Path, config: SearchConfig, number: int, given: dict[str, Manifest]) -> Manifest:
        data = folder / f"worker-{number}" / "data"
        data.mkdir(parents=True, exist_ok=True)
        result = steps.search_worker(config, data, worker=number, **given)
        return Manifest.describe(data, kind=result.kind, counts=result.counts, metadata=result.metadata)

    def select(self, folder: Path, config: SearchConfig, workers: list[Manifest], given: dict[str, Manifest]) -> Any:
        data = folder / f"select-{len(list(folder.iterdir()))}" / "data"
        data.mkdir(parents=True)
        named = {f"worker_{number}": worker for number, worker in enumerate(workers)}
        result = steps.select_trial(config, data, **given, **named)
        return Manifest.describe(data, kind=result.kind, counts=result.counts, metadata=result.metadata)

    def test_workers_share_the_trials_and_the_best_of_all_is_chosen(
        self, home: Home, trainings: Trainings, given: dict[str, Manifest], tmp_path: Path
    ) -> None:
        config = section(max_parallel_jobs=2)
        others: list[Manifest] = []

        def start_another(count: int) -> None:
            if count == 2:  # while trial 2 of the first is running
                others.append(self.worker(tmp_path, config, 1, given))

        trainings.on_training = start_another
        first = self.worker(tmp_path, config, 0, given)
        idle = self.worker(tmp_path, config, 2, given)
        workers = [first, *others, idle]
        assert sum(one.counts["trials"] for one in workers) == 6
        assert idle.counts["trials"] == 0
        found = self.select(tmp_path, config, workers, given)
        trials = told(found)["trials"]
        assert [trial["number"] for trial in trials] == list(range(1, 7))
        assert {trial["worker"] for trial in trials} == {0, 1}
        best = min(trials, key=lambda trial: trial["value"])
        assert found.metadata["trial"] == best["number"]
        assert found.metadata["weights_digest"] == best["digest"]
        assert sum(entry.path.endswith("history.jsonl") for entry in found.files) == 6
        assert self.select(tmp_path, config, workers[::-1], given).digest == found.digest
        with pytest.raises(UserError, match=r"worker_0: .* is of another search"):
            self.select(tmp_path, section(max_parallel_jobs=2, seed=3), workers, given)
        trainings.values[0] = -1.0
        assert self.select(tmp_path, config, workers, given).metadata["winner"] == "base"

    def test_a_killed_worker_takes_up_its_own_trial(
        self, home: Home, trainings: Trainings, given: dict[str, Manifest], tmp_path: Path
    ) -> None:
        config = section(max_parallel_jobs=2)

        def kill(count: int) -> None:
            if count == 2:
                raise Killed

        trainings.on_training = kill
        with pytest.raises(Killed):
            self.worker(tmp_path, config, 0, given)
        other = self.worker(tmp_path, config, 1, given)
        assert [record["number"] for record in other.metadata["records"]] == [3, 4, 5, 6]
        back = self.worker(tmp_path, config, 0, given)
        assert [(one["number"], one["state"]) for one in back.metadata["records"]] == [
            (1, "complete"),
            (2, "complete"),
        ]

    def test_more_trials_at_once_than_cores_are_refused(
        self, trainings: Trainings, given: dict[str, Manifest], tmp_path: Path
    ) -> None:
        cores = available_cores()
        with pytest.raises(UserError, match=rf"search\.max_parallel_jobs: {cores + 1} trials .* use at most {cores}"):
            run(tmp_path / "a", section(max_parallel_jobs=cores + 1), **given)


def test_trials_are_runs_below_the_step(
    home: Home, make_run: Any, trainings: Trainings, given: dict[str, Manifest], tmp_path: Path
) -> None:
    folder: RunFolder = make_run(home)
    folder.enter("tune")
    trainings.values[2] = float("nan")
    run(tmp_path / "a", section(pruning=SEGMENTS, max_jobs=8), **given)
    spools = {path.stem: [one for _, one in read_lines(path)] for path in (folder.path / "spool").glob("*.jsonl")}
    assert sorted(spools) == ["tune", *(f"tune.trial-{number}" for number in range(9))]
    ends = [spools[f"tune.trial-{number}"][-1]["status"] for number in range(9)]
    assert ends[:3] == ["FINISHED", "FINISHED", "FAILED"]
    assert "KILLED" in ends, "given up"
    values = [one["values"] for one in spools["tune.trial-1"] if one["type"] == "metrics"]
    assert [list(value) for value in values] == [["validation_sql"]] * 2
    (params,) = [one["values"] for one in spools["tune.trial-1"] if one["type"] == "params"]
    assert params["trial"] == 1
    assert 1e-5 <= params["learning_rate"] <= 1e-4
    assert any("zero_shot_validation_sql" in one.get("values", {}) for one in spools["tune"])


def test_the_report_tells_every_trial(given: dict[str, Manifest], tmp_path: Path) -> None:
    with Trainings(figures=True) as trainings:
        trainings.failures[2] = UserError("training.learning_rate: <b>5</b> diverged")
        found = run(tmp_path / "a", section(pruning=SEGMENTS, max_jobs=8), **given)
    page, table = found.path("report.html").read_text(), found.path("report.md").read_text()
    assert page.count("<svg") == 3
    assert "&lt;b&gt;5&lt;/b&gt; diverged" in page
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 1 + 1 + 8
    assert any("chosen" in row for row in rows)
    assert any("given up" in row for row in rows)
    assert json.loads(found.path("trials.json").read_text())["zero_shot"] == BASE_VALUE
    assert np.isfinite(found.metrics["validation_sql"])
