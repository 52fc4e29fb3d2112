"""Steps that search for the best training of a Chronos: alone on one machine, or as workers and a choice among theirs.

`search_chronos` runs all trials, some at once where the section says so. In a pipeline that fans out, each of several
`search_worker` runs trials of one search, which they share through its storage, and `select_trial` takes the best.
"""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from modelmill.components.core import tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.model_folder import digest_of, model_folder
from modelmill.components.core.step import StepResult, step_options
from modelmill.components.core.weights import weights_digest
from modelmill.components.forecasting.chronos_model import read_chronos
from modelmill.components.forecasting.search_config import SearchConfig
from modelmill.components.forecasting.search_report import write_report
from modelmill.components.forecasting.search_storage import open_study
from modelmill.components.forecasting.search_trials import FOLDER, TrialRecord, Trials, best_of, train_section
from modelmill.components.forecasting.search_validation import judge
from modelmill.components.training.launch import Launcher, LocalLauncher, current_launcher
from modelmill.components.training.processes import available_cores, die_with_parent

logger = logging.getLogger("modelmill")
TRIALS_FILE, MODEL = "trials.json", "model"


@step_options(resumable=True, device=True, launches=True)
def search_chronos(
    config: SearchConfig, output: Path, *, series: Manifest, base: Manifest, launcher: Launcher | None = None
) -> StepResult:
    """Search for the best training of a Chronos on validation windows, the untrained base being trial 0.

    Writes `model/`, `trials.json`, a report and the history of every trial. The result is never worse than the base
    on the validation windows: where no trial is better, it is the base's own weights. The windows of the backtest are
    read by no part of it. A second call on an unfinished folder goes on; with one trial at a time it ends as an
    undisturbed search does.

    Args:
        config: of the search.
        output: the artifact's folder; the storage lies beside it unless `MODELMILL_SEARCH_STORAGE` names a database.
        series: manifest of `prepare_series`.
        base: manifest of the model that every trial begins with.
        launcher: of the training processes; default this machine.

    Returns:
        kind `model`; counts `trials`, `complete`, `pruned`, `failed`, `lost`; metrics `validation_<metric>` and
        `zero_shot_validation_<metric>`; metadata `flavor`, `family`, `method` (full, lora or zero-shot), `winner`
        (base or trial), `trial`, `params`, `refit`, `weights_digest`, `base_digest`, `dataset_digest`.

    Raises:
        UserError: section, series and base do not fit, or the storage cannot be used or holds another search.
        TrainingStoppedError: it was told to stop and can go on.
    """
    family = _check(config, base, launcher)
    zero_shot = _zero_shot(config, series, base, output.parent / "zero-shot.json")
    database = output.parent / "search.sqlite"
    trials = _trials(config, output, database, series=series, base=base, launcher=launcher)
    if config.max_parallel_jobs > 1:
        _run_workers(config, output, database, series, base, launcher)
    else:
        trials.run()
    records, best = trials.records(), trials.best()
    winner = best if _is_better(best, zero_shot) else None
    if winner is not None:
        trials.weights(winner, output / MODEL)
    trials.clear()
    return _finish(config, output, records, winner, zero_shot, family, series=series, base=base, launcher=launcher)


@step_options(resumable=True, device=True, launches=True)
def search_worker(
    config: SearchConfig,
    output: Path,
    *,
    series: Manifest,
    base: Manifest,
    worker: int,
    launcher: Launcher | None = None,
) -> StepResult:
    """Run trials of a search that others work on too, until there are as many as asked for.

    Workers share the trials through the search's storage: the database that `MODELMILL_SEARCH_STORAGE` names, or a
    SQLite file in the home, which every worker must then see. A worker beyond `max_parallel_jobs` does nothing.

    Args:
        config: of the search.
        output: the artifact's folder; takes the weights of this worker's best trial.
        series: manifest of `prepare_series`.
        base: manifest of the model that every trial begins with.
        worker: number of this worker, from 0.
        launcher: of the training processes; default this machine.

    Returns:
        kind `trials`; counts `trials`; metadata `records` (of this worker's trials) and `identity` of the search.

    Raises:
        UserError: as `search_chronos`.
    """
    _check(config, base, launcher, alone=False)
    records: list[TrialRecord] = []
    identity = config.identity(series.digest, digest_of(base))
    if worker < config.max_parallel_jobs:
        database = Home.current().root / "searches" / f"{identity[:24]}.sqlite"
        database.parent.mkdir(parents=True, exist_ok=True)
        trials = _trials(config, output, database, series=series, base=base, launcher=launcher, worker=worker)
        trials.run()
        records, best = trials.records(), trials.best()
        if best is not None:
            trials.weights(best, output / MODEL)
        trials.clear()
    metadata = {"records": [record.record() for record in records], "identity": identity}
    return StepResult("trials", counts={"trials": len(records)}, metadata=metadata)


@step_options(device=True, launches=True)
def select_trial(
    config: SearchConfig,
    output: Path,
    *,
    series: Manifest,
    base: Manifest,
    launcher: Launcher | None = None,
    **workers: Manifest,
) -> StepResult:
    """Take the best trial of some workers, or the base where none is better.

    Args:
        config: of the search.
        output: an empty folder.
        series: manifest of `prepare_series`.
        base: manifest of the model that every trial began with.
        launcher: of the training processes of a refit; default this machine.
        workers: manifests of `search_worker`.

    Returns:
        As `search_chronos`.

    Raises:
        UserError: the workers were of another search.
    """
    family = _check(config, base, launcher, alone=False)
    identity = config.identity(series.digest, digest_of(base))
    records, holders = list[TrialRecord](), dict[int, Manifest]()
    for name, manifest in sorted(workers.items()):
        if manifest.metadata.get("identity") != identity:
            raise UserError(f"{name}: {manifest.uri} is of another search; give the workers the same section and base")
        for record in manifest.metadata["records"]:
            found = TrialRecord(**{**record, "course": [(step, value) for step, value in record["course"]]})
            records.append(found)
            holders[found.number] = manifest
        for history in sorted(entry.path for entry in manifest.files if entry.path.startswith(f"{FOLDER}/")):
            (output / history).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(manifest.path(history), output / history)
    records.sort(key=lambda record: record.number)
    zero_shot, best = _zero_shot(config, series, base), best_of(records)
    winner = best if _is_better(best, zero_shot) else None
    if winner is not None:
        shutil.copytree(model_folder(holders[winner.number]), output / MODEL)
    return _finish(config, output, records, winner, zero_shot, family, series=series, base=base, launcher=launcher)


def _check(config: SearchConfig, base: Manifest, launcher: Launcher | None, *, alone: bool = True) -> str:
    """Refuse what cannot be searched before anything is trained; returns the base's family."""
    family = read_chronos(model_folder(base, "base"), "base").family
    if (family == "chronos-2") != (config.chronos2 is not None):
        wanted, given = ("chronos2", "chronos") if family == "chronos-2" else ("chronos", "chronos2")
        raise UserError(f"search.{given}: the base is a {family}, which is tuned by {wanted}; write search.{wanted}")
    if config.chronos is None:
        return family
    place, training = launcher or current_launcher(), config.chronos.training
    place.check(training)
    if alone and config.max_parallel_jobs > 1 and isinstance(place, LocalLauncher):
        each, cores = training.parallel.processes_per_node, available_cores()
        if each * config.max_parallel_jobs > cores:
            raise UserError(
                f"search.max_parallel_jobs: {config.max_parallel_jobs} trials at once, of {each} processes, are more"
                f" than the {cores} cores of this machine; use at most {max(1, cores // each)}"
            )
        if training.threads_per_process is None:
            logger.warning(
                "every process of %d trials at once starts threads for all cores; set"
                " search.chronos.training.threads_per_process",
                config.max_parallel_jobs,
            )
    return family


def _trials(
    config: SearchConfig,
    output: Path,
    database: Path,
    *,
    series: Manifest,
    base: Manifest,
    launcher: Launcher | None,
    worker: int | None = None,
) -> Trials:
    study = open_study(config, config.identity(series.digest, digest_of(base)), database)
    return Trials(config, study, output / FOLDER, series=series, base=base, launcher=launcher, worker=worker)


def _run_workers(
    config: SearchConfig, output: Path, database: Path, series: Manifest, base: Manifest, launcher: Launcher | None
) -> None:
    """Run trials in processes of their own, which end with this one."""
    context = multiprocessing.get_context("spawn")  # torch and databases survive no fork
    count = min(config.max_parallel_jobs, config.max_jobs)
    with ProcessPoolExecutor(count, mp_context=context, initializer=_begin_worker) as pool:
        running = [
            pool.submit(_work, config, output, database, series, base, launcher, number) for number in range(count)
        ]
        for one in running:
            one.result()


def _begin_worker() -> None:
    die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True)


def _work(
    config: SearchConfig,
    output: Path,
    database: Path,
    series: Manifest,
    base: Manifest,
    launcher: Launcher | None,
    worker: int,
) -> None:
    _trials(config, output, database, series=series, base=base, launcher=launcher, worker=worker).run()


def _zero_shot(config: SearchConfig, series: Manifest, base: Manifest, kept: Path | None = None) -> float:
    """Value of the untrained base, nan where it cannot be judged; read from `kept` where an attempt left it there."""
    with tracking.child("trial-0") as run:
        tracking.log_params({"trial": 0})
        tracking.set_tags({"modelmill.trial": "zero-shot"})
        if kept is not None and kept.is_file():
            value = float(json.loads(kept.read_bytes()))
        else:
            judged = judge(config, series, base)
            value = judged.value
            if judged.problem:
                run.status = "FAILED"
                logger.warning("the base cannot be judged: %s", judged.problem)
            if kept is not None:
                kept.write_text(json.dumps(value))
        if math.isfinite(value):
            tracking.log_metrics({f"validation_{config.metric}": value})
    logger.info("trial 0, the untrained base: %.6g", value)
    return value


def _is_better(best: TrialRecord | None, zero_shot: float) -> bool:
    return best is not None and best.value is not None and not best.value >= zero_shot


def _finish(
    config: SearchConfig,
    output: Path,
    records: list[TrialRecord],
    winner: TrialRecord | None,
    zero_shot: float,
    family: str,
    *,
    series: Manifest,
    base: Manifest,
    launcher: Launcher | None,
) -> StepResult:
    """Lay down the model and what is told of the search."""
    refit = config.refit and winner is not None
    if winner is None:
        shutil.copytree(model_folder(base, "base"), output / MODEL, dirs_exist_ok=True)
    elif refit:
        _refit(config, output, winner, series=series, base=base, launcher=launcher)
    digest = weights_digest(output / MODEL)
    told = {
        "metric": config.metric,
        "zero_shot": zero_shot if math.isfinite(zero_shot) else None,
        "winner": 0 if winner is None else winner.number,
        "refit": refit,
        "trials": [record.record() for record in records],
    }
    (output / TRIALS_FILE).write_text(json.dumps(told, indent=1, allow_nan=False) + "\n", "utf-8")
    write_report(output, told, config)
    counts = {"trials": len(records)}
    counts |= {state: sum(one.state == state for one in records) for state in ("complete", "pruned", "failed", "lost")}
    name = f"validation_{config.metric}"
    value = zero_shot if winner is None or winner.value is None else winner.value
    values = {name: value, f"zero_shot_{name}": zero_shot}
    metrics = {key: number for key, number in values.items() if math.isfinite(number)}
    tracking.log_metrics(metrics)
    tracking.log_params(
        {"base_digest": digest_of(base), "winner": told["winner"], **(winner.params if winner else {})}
    )
    for file in (TRIALS_FILE, "report.html", "report.md"):
        tracking.log_artifact(output / file, "search")
    profile = {key: count for key, count in series.counts.items() if key in ("series", "points")}
    tracking.log_dataset(name="series", digest=series.digest, source=series.uri, context="training", profile=profile)
    tuned = "full" if config.chronos2 is None else config.chronos2.method
    metadata: dict[str, Any] = {
        "flavor": "forecaster",
        "family": family,
        "method": "zero-shot" if winner is None else tuned,
        "winner": "base" if winner is None else "trial",
        "trial": told["winner"],
        "params": {} if winner is None else winner.params,
        "refit": refit,
        "weights_digest": digest,
        "base_digest": digest_of(base),
        "dataset_digest": series.digest,
    }
    return StepResult("model", counts=counts, metrics=metrics, metadata=metadata)


def _refit(
    config: SearchConfig,
    output: Path,
    winner: TrialRecord,
    *,
    series: Manifest,
    base: Manifest,
    launcher: Launcher | None,
) -> None:
    """Replace the winner's weights by those of the same training on all that is not held back for the backtest."""
    folder = output.parent / "refit"
    with tracking.child("refit"):
        model = train_section(
            config,
            winner.params,
            folder,
            step=config.steps_of(winner.params),
            series=series,
            base=base,
            launcher=launcher,
        )
    shutil.rmtree(output / MODEL, ignore_errors=True)
    shutil.copytree(Path(model.uri) / MODEL, output / MODEL)
