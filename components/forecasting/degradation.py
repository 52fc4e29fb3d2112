"""Step `check_degradation`: is there a reason to retrain the champion?"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from modelmill.components.core import tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepResult
from modelmill.components.evaluation.resampling import compare_paired
from modelmill.components.forecasting.backtest_config import SEASONAL_NAIVE
from modelmill.components.forecasting.drift_config import DegradationConfig
from modelmill.components.forecasting.metrics import geometric_means, relative_errors

SCORES, RECORD, MARKDOWN = "scores.parquet", "degradation.json", "report.md"
logger = logging.getLogger("modelmill")


@dataclass(frozen=True)
class Accuracy:
    """The champion beside Seasonal Naive on the same windows.

    Attributes:
        source: `published forecasts` or `rolling backtest`.
        pairs: windows of series.
        error: mean of the champion's.
        naive: mean of Seasonal Naive's.
        ratio: geometric mean of one by the other.
        p_value: of the hypothesis that the champion's mean is at most `max_ratio` times the other; None where accuracy
            is no reason.
        worse: whether that is rejected.
    """

    source: str
    pairs: int
    error: float
    naive: float
    ratio: float
    p_value: float | None
    worse: bool


def check_degradation(
    config: DegradationConfig, output: Path, *, drift: Manifest, judged: Manifest, backtest: Manifest
) -> StepResult:
    """Decide whether the champion is to be retrained.

    It is where its errors are shown to exceed `max_ratio` times those of Seasonal Naive, by a paired permutation test
    over windows of series that do not overlap; or where the input drifted. Published forecasts decide where there are
    enough of them, else the rolling backtest. A champion that has seen all points there are is left alone.

    Args:
        config: metric and bounds.
        output: an empty folder; takes `degradation.json` and `report.md`.
        drift: manifest of `detect_drift`.
        judged: manifest of `judge_forecasts`.
        backtest: manifest of `backtest` of the champion.

    Returns:
        kind `degradation`; metadata `found` and `reasons`; metrics `ratio`, `error`, `naive`, counts `pairs`.

    Raises:
        UserError: the artifacts are of other kinds or of different champions.
    """
    if judged.metadata.get("weights_digest") != backtest.metadata.get("weights_digest"):
        raise UserError("judged, backtest: they judge different champions; run both on the same")
    accuracy = _accuracy(config, judged, str(judged.kind), backtest)
    reasons = []
    if accuracy.worse:
        reasons.append(f"it is worse than {config.max_ratio:g} times seasonal-naive ({_told(config, accuracy)})")
    if config.on_drift and drift.metadata["drifted"]:
        reasons.append(str(drift.metadata["reason"]))
    new = drift.metadata["new_points"]
    too_early = new is not None and new < config.min_new_points
    found = bool(reasons) and not too_early
    verdict = _verdict(config, accuracy, reasons, drift, found)
    record: dict[str, Any] = {"found": found, "reasons": reasons, "new_points": new, "accuracy": _record(accuracy)}
    (output / RECORD).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (output / MARKDOWN).write_text(f"# Champion\n\n{verdict}\n", encoding="utf-8")
    logger.log(logging.WARNING if found else logging.INFO, "%s", verdict)
    metrics = {"error": accuracy.error, "naive": accuracy.naive, "ratio": accuracy.ratio}
    metrics = {name: value for name, value in metrics.items() if np.isfinite(value)}
    tracking.log_metrics(metrics)
    tracking.set_tags({"modelmill.degraded": "yes" if found else "no", "modelmill.degradation": verdict[:500]})
    tracking.log_artifact(output / MARKDOWN, "degradation")
    return StepResult("degradation", {"pairs": accuracy.pairs}, metrics, {"found": found, "reasons": reasons})


def _accuracy(config: DegradationConfig, judged: Manifest, kind: str, backtest: Manifest) -> Accuracy:
    if kind != "judged_forecasts" or backtest.kind != "scores":
        raise UserError("judged, backtest: give the outputs of judge_forecasts and of a backtest of the champion")
    own, naive = _pairs(judged, config.metric)
    source = "published forecasts"
    if len(own) < config.min_pairs:
        own, naive = _pairs(backtest, config.metric)
        source = "rolling backtest"
    if not len(own):
        return Accuracy(source, 0, float("nan"), float("nan"), float("nan"), None, False)
    ratio = float(geometric_means(relative_errors(np.stack([own, naive], axis=1), 1))[0])
    p_value = None
    if config.max_ratio is not None:
        p_value = compare_paired(
            own - config.max_ratio * naive,
            against=0.0,
            test="permutation",
            confidence=config.confidence,
            resamples=config.resamples,
            seed=config.seed,
        ).p_above
    worse = p_value is not None and p_value <= 1 - config.confidence
    return Accuracy(source, len(own), float(own.mean()), float(naive.mean()), ratio, p_value, worse)


def _pairs(scores: Manifest, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Errors of the champion and of Seasonal Naive on each window of a series that defines them."""
    table = pq.read_table(scores.path(SCORES), columns=["forecaster", "item_id", "window", metric])
    table = table.set_column(0, "forecaster", pc.cast(table.column("forecaster"), "string"))
    table = table.sort_by([("item_id", "ascending"), ("window", "ascending")])
    is_naive = pc.equal(table.column("forecaster"), SEASONAL_NAIVE).to_numpy()
    candidate = scores.metadata.get("candidate", "champion")
    is_own = pc.equal(table.column("forecaster"), candidate).to_numpy()
    values = table.column(metric).to_numpy()
    own, naive = values[is_own], values[is_naive]
    defined = np.isfinite(own) & np.isfinite(naive)
    return own[defined], naive[defined]


def _told(config: DegradationConfig, accuracy: Accuracy) -> str:
    p_value = "" if accuracy.p_value is None else f", p = {accuracy.p_value:.2g}"
    name = config.metric.upper()
    return (
        f"{name} {accuracy.error:.4g} against {accuracy.naive:.4g} on {accuracy.pairs:,} windows of"
        f" {accuracy.source}, ratio {accuracy.ratio:.3f}{p_value}"
    )


def _verdict(config: DegradationConfig, accuracy: Accuracy, reasons: list[str], drift: Manifest, found: bool) -> str:
    if found:
        return f"The champion is retrained: {'; '.join(reasons)}."
    if reasons:
        seen = f", up to {drift.metadata['last_seen']}" if drift.metadata["last_seen"] else ""
        return f"The champion stays, as it has seen all points there are{seen}: {'; '.join(reasons)}."
    measured = _told(config, accuracy) if accuracy.pairs else "no window could be judged"
    return f"The champion stays: {measured}; {drift.metadata['reason']}."


def _record(accuracy: Accuracy) -> dict[str, Any]:
    values = asdict(accuracy).items()
    return {name: None if isinstance(value, float) and not np.isfinite(value) else value for name, value in values}
