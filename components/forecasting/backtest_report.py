"""The report of a backtest: table against baselines, fan charts, calibration, error by step and by series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelmill.components.evaluation.page import html_table, markdown_table, page, text
from modelmill.components.forecasting.backtest_config import SEASONAL_NAIVE

HTML, MARKDOWN, FIGURES = "report.html", "report.md", "figures"
_NAMES = {"sql": "SQL", "wql": "WQL", "mase": "MASE", "mae": "MAE", "rmse": "RMSE"}


def write_report(output: Path, record: Mapping[str, Any]) -> None:
    """Write `report.html`, `report.md` and the figures as files of their own.

    Args:
        output: of the step.
        record: content of `backtest.json`.
    """
    # Imported here, so that a reused step does not pay for matplotlib.
    from modelmill.components.forecasting.backtest_figures import calibration_curve, error_by_step, windows_chart

    summary, metric = record["summary"], _NAMES[record["metric"]]
    figures = {f"series-{number}": windows_chart(drawn, record) for number, drawn in enumerate(record["drawn"], 1)}
    figures["calibration"] = calibration_curve(summary)
    figures["error-by-step"] = error_by_step(summary)
    (output / FIGURES).mkdir()
    for name, figure in figures.items():
        (output / FIGURES / f"{name}.svg").write_text(figure + "\n", encoding="utf-8")
    head, rows = _table(summary, metric)
    kinds = ["" if row["name"] == SEASONAL_NAIVE else _kind(row["skill"]) for row in summary["rows"]]
    worst_head, worst = _worst(summary, metric)
    verdict, note = _verdict(record), _note(record, metric)
    parts = [
        f"# Backtest\n\n{verdict}\n",
        markdown_table(head, rows),
        f"{note}\n",
        "## Series with the largest errors\n",
    ]
    parts.append(markdown_table(worst_head, worst))
    (output / MARKDOWN).write_text("\n".join(parts), encoding="utf-8")
    own = next(row for row in summary["rows"] if row["name"] == summary["candidate"])
    body = [
        f'<p class="verdict {_kind(own["skill"]) or "unclear"}">{text(verdict)}</p>',
        html_table(head, rows, kinds),
    ]
    body += [f"<p class=note>{text(note)}</p>", "<h2>Best, median and worst series</h2>"]
    for number, drawn in enumerate(record["drawn"], 1):
        caption = f"{drawn['role']}: {drawn['item_id']}, {metric} {drawn['error']:.4g}"
        body.append(f"<figure>{figures[f'series-{number}']}<figcaption>{text(caption)}</figcaption></figure>")
    body += ["<h2>Calibration</h2>", figures["calibration"], "<h2>Error by step ahead</h2>", figures["error-by-step"]]
    body += ["<h2>Series with the largest errors</h2>", html_table(worst_head, worst)]
    (output / HTML).write_text(page("Backtest", body), encoding="utf-8")


def _kind(skill: float | None) -> str:
    return "" if not skill else "better" if skill > 0 else "worse"


def _verdict(record: Mapping[str, Any]) -> str:
    summary = record["summary"]
    own = next(row for row in summary["rows"] if row["name"] == summary["candidate"])
    place = summary["rows"].index(own) + 1
    rank = f"{own['name']} is number {place} of {len(summary['rows'])} by {_NAMES[record['metric']]}"
    if own["skill"] is None or own["name"] == SEASONAL_NAIVE:
        return f"{rank}."
    side = "below" if own["skill"] >= 0 else "above"
    return f"{rank}; its error is {abs(own['skill']):.1%} {side} that of seasonal-naive (geometric mean over series)."


def _note(record: Mapping[str, Any], metric: str) -> str:
    plan = record["plan"]
    compared = f"{record['summary']['compared_series']:,} series"
    sentences = [
        f"{plan['windows']} windows of {plan['horizon']} steps, {plan['step']} apart, end each series.",
        "SQL, WQL, MASE, MAE and RMSE are over all series, as fev computes them.",
        f"Columns with x are geometric means over {compared} of the error by that of seasonal-naive,",
        f"each between 0.01 and 100. Skill is 1 minus that of {metric}; wins is the share of series and",
        "opponents beaten in it. Coverage is the share of actuals inside the interval. Fallbacks are",
        "forecasts that could not be made, for which seasonal-naive stood in.",
    ]
    return " ".join(sentences)


def _table(summary: Mapping[str, Any], metric: str) -> tuple[list[str], list[list[str]]]:
    metrics = [name for name in _NAMES if any(name in row["metrics"] for row in summary["rows"])]
    relative = [name for name in _NAMES if any(name in row["relative"] for row in summary["rows"])]
    interval = next(iter(summary["rows"][0]["coverage"]), None)
    head = ["forecaster", *(_NAMES[name] for name in metrics), *(f"{_NAMES[name]} x" for name in relative)]
    head += [f"coverage of {interval} %"] if interval else []
    head += ["fallbacks", "wins", "skill"]
    rows = []
    for row in summary["rows"]:
        cells = [row["name"], *(_number(row["metrics"].get(name)) for name in metrics)]
        cells += [_number(row["relative"].get(name), ".3f") for name in relative]
        cells += [_number(row["coverage"][interval], ".1%")] if interval else []
        cells += [f"{row['fallbacks']:,}", _number(row["win_rate"], ".0%"), _number(row["skill"], "+.1%")]
        rows.append(cells)
    return head, rows


def _worst(summary: Mapping[str, Any], metric: str) -> tuple[list[str], list[list[str]]]:
    entries: Sequence[Mapping[str, Any]] = summary["worst_series"]
    head = ["series", f"{metric} of {summary['candidate']}", f"{metric} of {SEASONAL_NAIVE}"]
    return head, [[one["item_id"], _number(one["error"]), _number(one["naive"])] for one in entries]


def _number(value: float | None, form: str = ".4g") -> str:
    return "" if value is None else format(value, form)
