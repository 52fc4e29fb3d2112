"""The trials of a search: each trains a model in segments, is validated after each, and may be given up."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelmill.components.core import events, tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepResult
from modelmill.components.core.weights import weights_digest
from modelmill.components.forecasting.chronos2_config import Chronos2TuneConfig
from modelmill.components.forecasting.search_config import Params, SearchConfig
from modelmill.components.forecasting.search_storage import next_trial, storage_errors, suggest
from modelmill.components.forecasting.search_validation import judge, training_view
from modelmill.components.forecasting.train_chronos import train_chronos
from modelmill.components.training.journal import HISTORY
from modelmill.components.training.launch import Launcher, RankFailedError, TrainingStoppedError

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

logger = logging.getLogger("modelmill")
FOLDER, _TRAINED, _MODEL = "trials", "trained.json", "model"
# What a trial's own values can do to a training; every other mistake would meet the next trial too.
_OWN_MISTAKES = ("training.learning_rate:", "chronos2.learning_rate:", "training.stability.max_rollbacks:")


@dataclass(frozen=True)
class TrialRecord:
    """What became of a trial.

    Attributes:
        number: from 1; 0 is the untrained base.
        params: values that were tried.
        state: complete, pruned, failed, or lost where its worker was killed and never came back.
        value: on the validation windows; of a pruned trial the last one, of a failed one none.
        course: (optimizer step, value) of each validation.
        reason: why it failed.
        worker: that ran it.
        digest: of the weights of a complete trial.
    """

    number: int
    params: Params
    state: str
    value: float | None
    course: list[tuple[int, float]] = field(default_factory=list)
    reason: str = ""
    worker: int = 0
    digest: str = ""

    def record(self) -> dict[str, Any]:
        return asdict(self)


class TrialFailed(Exception):
    """A trial that came to nothing; the search goes on with the next."""


class Trials:
    """Trains trials below a folder and keeps the weights of the best one there."""

    def __init__(
        self,
        config: SearchConfig,
        study: Study,
        folder: Path,
        *,
        series: Manifest,
        base: Manifest,
        launcher: Launcher | None,
        worker: int | None = None,
    ) -> None:
        """
        Args:
            config: of the search.
            study: where the trials are kept.
            folder: takes a folder for each trial, of which a short history stays.
            series: as `prepare_series` made them.
            base: that every trial begins with.
            launcher: of the engine's training processes; None as `train_chronos` chooses.
            worker: number of the worker whose trials these are; None: all trials are.
        """
        self.config, self.study, self.folder, self.series, self.base = config, study, folder, series, base
        self.launcher, self.worker = launcher, worker
        self.view = training_view(config, series)

    def run(self) -> None:
        """Run trials until there are as many as asked for.

        Raises:
            UserError: the storage cannot be used, or every trial would meet the same mistake.
            TrainingStoppedError: it was told to stop and can go on later.
        """
        with storage_errors():
            self._tidy()
            while (trial := next_trial(self.study, self.config, self._is_mine, self.worker or 0)) is not None:
                self._run_one(trial)
                self._tidy()

    def records(self) -> list[TrialRecord]:
        """What became of the trials of this worker, by their numbers."""
        with storage_errors():
            kept = [trial for trial in self.study.get_trials(deepcopy=False) if trial.number < self.config.max_jobs]
        return [self._record(trial) for trial in kept if self._is_mine(trial.user_attrs)]

    def best(self) -> TrialRecord | None:
        """The complete trial with the lowest value, of equal ones the first."""
        return best_of(self.records())

    def weights(self, best: TrialRecord, target: Path) -> None:
        """Move the weights of a trial to where they stay, training them again if they are lost."""
        if (target / "config.json").is_file() and weights_digest(target) == best.digest:
            return  # an attempt that was killed after it had moved them
        with tracking.child(f"trial-{best.number}"):
            model = self._trained(best.number, best.params, self.config.steps_of(best.params))
        if model.metadata["weights_digest"] != best.digest:
            logger.warning("trial %d was trained again, with weights that differ in their last bits", best.number)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(Path(model.uri) / _MODEL, target)

    def clear(self) -> None:
        """Leave of every trial its history only."""
        for folder in sorted(self.folder.glob("*")):
            _strip(folder, keep_weights=False)

    def _is_mine(self, attributes: Mapping[str, Any]) -> bool:
        return self.worker is None or attributes.get("worker") == self.worker

    def _run_one(self, trial: Trial) -> None:
        from optuna.trial import TrialState

        number, params = trial.number + 1, suggest(self.config, trial)
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in params.items())
        events.progress(f"trial {number} of {self.config.max_jobs}: {shown}")
        logger.info("trial %d of %d: %s", number, self.config.max_jobs, shown)
        with tracking.child(f"trial-{number}") as run:
            tracking.log_params({"trial": number, **params})
            try:
                value = self._train_and_validate(trial, params)
            except TrialFailed as error:
                run.status, state = "FAILED", "failed"
                trial.set_user_attr("reason", str(error))
                self.study.tell(trial, state=TrialState.FAIL)
                logger.warning("trial %d failed: %s", number, error)
            else:
                state = "pruned" if value is None else "complete"
                if value is None:
                    run.status = "KILLED"
                    self.study.tell(trial, state=TrialState.PRUNED)
                else:
                    self.study.tell(trial, value)
                logger.info("trial %d is %s: %s", number, state, "" if value is None else f"{value:.6g}")
            tracking.set_tags({"modelmill.trial": state})

    def _train_and_validate(self, trial: Trial, params: Params) -> float | None:
        """Value of a trial, None when it was given up.

        Raises:
            TrialFailed: its training or its forecasts came to nothing.
        """
        known = dict(self.study.get_trials(deepcopy=False)[trial.number].intermediate_values)
        value = math.nan
        for segment in range(1, self.config.segments + 1):
            step = self._step_after(params, segment)
            if segment in known:  # of an attempt that was killed
                value = known[segment]
            else:
                model = self._attempt(trial.number + 1, params, step)
                judged = judge(self.config, self.series, model)
                if judged.problem:
                    raise TrialFailed(judged.problem)
                value = judged.value
                trial.set_user_attr("weights_digest", model.metadata["weights_digest"])
                trial.report(value, segment)
            tracking.log_metrics({f"validation_{self.config.metric}": value}, step=step)
            if segment < self.config.segments and trial.should_prune():
                return None
        return value

    def _step_after(self, params: Params, segment: int) -> int:
        return -(-self.config.steps_of(params) * segment // self.config.segments)

    def _attempt(self, number: int, params: Params, step: int) -> Manifest:
        try:
            return self._trained(number, params, step)
        except TrainingStoppedError:
            raise
        except UserError as error:
            if not str(error).startswith(_OWN_MISTAKES):
                raise
            raise TrialFailed(str(error)) from None
        except RankFailedError as error:
            raise TrialFailed(str(error).partition("; the end of its log")[0]) from None
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            raise TrialFailed(f"out of memory: {str(error).splitlines()[0]}") from None

    def _trained(self, number: int, params: Params, step: int) -> Manifest:
        """Model of a trial after a step, trained from where its folder stands."""
        return train_section(
            self.config,
            params,
            self.folder / f"{number:03d}",
            step=step,
            series=self.view,
            base=self.base,
            launcher=self.launcher,
        )

    def _record(self, trial: FrozenTrial) -> TrialRecord:
        from optuna.trial import TrialState

        states = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
        params: Params = dict(trial.params)
        course = [(self._step_after(params, one), value) for one, value in sorted(trial.intermediate_values.items())]
        state = states.get(trial.state, "lost")
        last = course[-1][1] if course and state == "pruned" else None
        return TrialRecord(
            number=trial.number + 1,
            params=params,
            state=state,
            value=trial.value if state == "complete" else last,
            course=course,
            reason=trial.user_attrs.get("reason", ""),
            worker=trial.user_attrs.get("worker", 0),
            digest=trial.user_attrs.get("weights_digest", "") if state == "complete" else "",
        )

    def _tidy(self) -> None:
        """Free what trials that are over do not need any more: all but the histories and the best one's weights."""
        records = self.records()
        best = best_of(records)
        for record in records:
            if record.state != "lost":
                _strip(self.folder / f"{record.number:03d}", keep_weights=best is not None and record == best)


def best_of(records: list[TrialRecord]) -> TrialRecord | None:
    """The complete trial with the lowest value, of equal ones the first."""
    complete = [record for record in records if record.state == "complete" and record.value is not None]
    return min(complete, key=lambda record: (record.value, record.number), default=None)


def train_section(
    config: SearchConfig,
    params: Params,
    folder: Path,
    *,
    step: int,
    series: Manifest,
    base: Manifest,
    launcher: Launcher | None,
) -> Manifest:
    """Train by a trial's section up to a step, from where an earlier call left off; trains nothing twice.

    Args:
        config: of the search.
        params: the trial's values.
        folder: of the trial; `data/` in it takes the model.
        step: optimizer step after which the model is exported.
        series: what may be trained on is not held back in them.
        base: to begin with.
        launcher: see `train_chronos`.
    """
    data, marker = folder / "data", folder / _TRAINED
    if marker.is_file() and (data / _MODEL / "config.json").is_file():
        told = json.loads(marker.read_bytes())
        if told["step"] == step and weights_digest(data / _MODEL) == told["metadata"]["weights_digest"]:
            return Manifest.describe(data, kind="model", counts=told["counts"], metadata=told["metadata"])
    result = _train(config, params, folder, step, series=series, base=base, launcher=launcher)
    temporary = marker.with_name(f".{_TRAINED}")
    temporary.write_text(json.dumps({"step": step, "counts": result.counts, "metadata": result.metadata}))
    os.replace(temporary, marker)
    return Manifest.describe(data, kind=result.kind, counts=result.counts, metadata=result.metadata)


def _train(
    config: SearchConfig,
    params: Params,
    folder: Path,
    step: int,
    *,
    series: Manifest,
    base: Manifest,
    launcher: Launcher | None,
) -> StepResult:
    data, section = folder / "data", config.training_of(params)
    if isinstance(section, Chronos2TuneConfig):
        from modelmill.components.forecasting.tune_chronos2 import tune_chronos2

        shutil.rmtree(folder, ignore_errors=True)  # its library goes on from no checkpoint
        data.mkdir(parents=True)
        return tune_chronos2(section, data, series=series, base=base)
    data.mkdir(parents=True, exist_ok=True)
    until = step if step < section.training.steps else None
    return train_chronos(section, data, series=series, base=base, launcher=launcher, until=until)


def _strip(folder: Path, *, keep_weights: bool) -> None:
    if not folder.is_dir():
        return
    kept = {folder / "data", *([folder / _TRAINED] if keep_weights else [])}
    kept |= {folder / "data" / name for name in (HISTORY, *([_MODEL] if keep_weights else []))}
    for path in [*folder.iterdir(), *(folder / "data").glob("*")]:
        if path not in kept and path.exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
