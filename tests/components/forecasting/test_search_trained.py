"""Searches that really train: nothing of the future reaches them, segments change nothing, a kill neither."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from modelmill.components.core.home import HOME_VARIABLE
from modelmill.components.core.manifest import Manifest
from modelmill.components.forecasting.search_chronos import search_chronos
from modelmill.components.forecasting.search_config import SearchConfig
from modelmill.components.forecasting.search_storage import STORAGE_VARIABLE
from modelmill.components.forecasting.search_validation import judge
from modelmill.components.training.launch import LAUNCHED_VARIABLE, TrainingJob, TrainingResult
from tests.components.forecasting import chronos_models as models
from tests.components.forecasting.searches import told
from tests.components.forecasting.test_chronos_training import TRAINING, Here, waves

HORIZON = 8


class KilledBefore(Here):
    """Trains in this process, and kills it at once instead of training for the n-th time."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._left = count

    def launch(self, job: TrainingJob) -> TrainingResult:
        self._left -= 1
        if not self._left:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().launch(job)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(LAUNCHED_VARIABLE, "0")
        meeting = tmp_path_factory.mktemp("meeting") / "rendezvous"
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def no_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STORAGE_VARIABLE, raising=False)


def section(**changes: Any) -> SearchConfig:
    space = {"learning_rate": [1e-3, 1e-1]}
    given = {"chronos": {"training": TRAINING}, "space": space, "max_jobs": 2, "startup_trials": 1, **changes}
    return SearchConfig.model_validate(given)


def search(folder: Path, config: SearchConfig, *, launcher: Any = None, **given: Manifest) -> Manifest:
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    result = search_chronos(config, data, launcher=launcher or Here(), **given)
    return Manifest.describe(
        data, kind=result.kind, counts=result.counts, metrics=result.metrics, metadata=result.metadata
    )


def series_of(folder: Path, values: list[np.ndarray]) -> Manifest:
    return models.series_manifest(folder, values, horizon=HORIZON, windows=2)


def spiked(first: int, last: int | None) -> list[np.ndarray]:
    found = [values.copy() for values in waves(6)]
    for values in found:
        values[first:last] = 1e6
    return found


@pytest.mark.usefixtures("one_rank")
class TestNothingOfTheFuture:
    def test_reaches_a_trial_or_its_validation(self, tmp_path: Path) -> None:
        base = models.bolt(tmp_path / "base")
        plain = series_of(tmp_path / "plain", waves(6))
        # Two windows are the backtest's; what came in them changes nothing at all.
        tested = series_of(tmp_path / "tested", spiked(-2 * HORIZON, None))
        given = {"plain": plain, "tested": tested}
        found = [search(tmp_path / f"{name}-search", section(), series=given[name], base=base) for name in given]
        assert told(found[0]) == told(found[1])
        assert found[0].metadata["weights_digest"] == found[1].metadata["weights_digest"]
        assert found[0].metadata["winner"] == "trial", "or the equality would say nothing"
        # What came in the validation window changes how trials are judged, not what they learn.
        judged = series_of(tmp_path / "judged", spiked(-3 * HORIZON, -2 * HORIZON))
        other = told(search(tmp_path / "c", section(max_jobs=1), series=judged, base=base))
        (first, spiky) = told(found[0])["trials"][0], other["trials"][0]
        assert first["digest"] == spiky["digest"]
        assert spiky["value"] != first["value"]
        assert other["zero_shot"] != told(found[0])["zero_shot"]
        # The engine's own validation, which the training's section asks for, holds back one horizon more.
        before = series_of(tmp_path / "before", spiked(-5 * HORIZON, -4 * HORIZON))
        changed = told(search(tmp_path / "d", section(max_jobs=1), series=before, base=base))["trials"][0]
        assert changed["digest"] != first["digest"], "what comes before is trained on"

    def test_the_result_is_never_worse_than_the_base(self, tmp_path: Path) -> None:
        base, series = models.bolt(tmp_path / "base"), series_of(tmp_path / "series", waves(6))
        harmful = {"learning_rate": [5.0, 50.0]}
        found = search(tmp_path / "a", section(space=harmful), series=series, base=base)
        assert (found.metadata["winner"], found.metadata["weights_digest"]) == (
            "base",
            base.metadata["weights_digest"],
        )
        assert judge(section(), series, found).value == found.metrics["validation_sql"]
        assert found.metrics["validation_sql"] == found.metrics["zero_shot_validation_sql"]


@pytest.mark.usefixtures("one_rank")
def test_segments_change_nothing_but_that_a_trial_can_end(tmp_path: Path) -> None:
    base, series = models.bolt(tmp_path / "base"), series_of(tmp_path / "series", waves(6))
    whole = told(search(tmp_path / "whole", section(), series=series, base=base))
    pruning = {"segments": 3, "startup_trials": 5}
    parts = told(search(tmp_path / "parts", section(pruning=pruning), series=series, base=base))
    assert [trial["digest"] for trial in parts["trials"]] == [trial["digest"] for trial in whole["trials"]]
    assert [trial["value"] for trial in parts["trials"]] == [trial["value"] for trial in whole["trials"]]
    assert [step for step, _ in parts["trials"][0]["course"]] == [2, 4, 6]


@pytest.mark.slow
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_chronos2_is_searched_by_its_library(tmp_path: Path, method: str) -> None:
    base, series = models.chronos2(tmp_path / "base"), series_of(tmp_path / "series", waves(6))
    rank = {"rank": [2, 4]} if method == "lora" else {}
    tuning = {"method": method, "steps": 6, "batch_size": 8, "device": "cpu", "log_every": 2, "validate_every": None}
    config = section(chronos=None, chronos2=tuning, space={"learning_rate": [1e-3, 1e-1], **rank})
    found = search(tmp_path / "a", config, series=series, base=base)
    assert found.metadata["family"] == "chronos-2"
    assert found.metadata["method"] in (method, "zero-shot")
    assert found.counts["complete"] == 2
    assert found.metrics["validation_sql"] <= found.metrics["zero_shot_validation_sql"]
    assert judge(config, series, found).value == pytest.approx(found.metrics["validation_sql"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("one_rank")
def test_a_search_killed_hard_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    base, series = models.bolt(tmp_path / "base"), series_of(tmp_path / "series", waves(6))
    pruning = {"segments": 2, "startup_trials": 2}
    config = section(max_jobs=4, pruning=pruning)
    whole = search(tmp_path / "whole", config, series=series, base=base)
    series.write(tmp_path / "series.json")
    base.write(tmp_path / "base.json")
    (tmp_path / "config.json").write_text(config.model_dump_json())
    command = [sys.executable, "-m", "tests.components.forecasting.test_search_trained", str(tmp_path)]
    ends = [subprocess.run([*command, after], timeout=300, check=False).returncode for after in ("4", "3", "0")]
    assert ends == [-signal.SIGKILL, -signal.SIGKILL, 0]
    for name in ("trials.json", "report.md", "model/model.safetensors"):
        assert (tmp_path / "killed" / "data" / name).read_bytes() == whole.path(name).read_bytes()


@pytest.mark.slow
def test_trials_run_at_once_in_processes_of_their_own(tmp_path: Path) -> None:
    base, series = models.bolt(tmp_path / "base"), series_of(tmp_path / "series", waves(6))
    data = tmp_path / "a" / "data"
    data.mkdir(parents=True)
    result = search_chronos(section(max_jobs=3, max_parallel_jobs=2), data, series=series, base=base)
    trials = told(Manifest.describe(data, kind="model"))["trials"]
    assert {trial["worker"] for trial in trials} == {0, 1}
    assert result.counts["complete"] == 3
    best = min(trials, key=lambda trial: (trial["value"], trial["number"]))
    assert result.metadata["trial"] == best["number"]
    assert result.metadata["weights_digest"] == best["digest"]


def main() -> None:
    folder, after = Path(sys.argv[1]), int(sys.argv[2])
    os.environ |= {LAUNCHED_VARIABLE: "0", HOME_VARIABLE: str(folder / "home")}
    (folder / "meeting").unlink(missing_ok=True)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
    config = SearchConfig.model_validate_json((folder / "config.json").read_text())
    given = {name: Manifest.read(folder / f"{name}.json") for name in ("series", "base")}
    search(folder / "killed", config, launcher=KilledBefore(after), **given)


if __name__ == "__main__":
    main()
