"""The report of a benchmark: forecasters over all tasks, and every task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelmill.components.evaluation.page import html_table, markdown_table, page, text
from modelmill.components.forecasting.backtest_config import SEASONAL_NAIVE
from modelmill.components.forecasting.metrics import METRICS

HTML, MARKDOWN = "report.html", "report.md"


def write_report(output: Path, record: Mapping[str, Any]) -> None:
    """Write `report.html` and `report.md`.

    Args:
        output: of the step.
        record: content of `benchmark.json`.
    """
    head, rows = _board(record)
    names = [row["name"] for row in record["leaderboard"]]
    task_head = ["task", "metric", *names]
    task_rows = []
    for task in record["tasks"]:
        errors = [task["metrics"][name].get(task["metric"]) for name in names]
        task_rows.append([task["name"], task["metric"].upper(), *(_shown(error) for error in errors)])
    sentences = [
        f"{len(record['tasks'])} tasks.",
        f"Columns with x are geometric means over tasks of the error by that of {SEASONAL_NAIVE}, each between 0.01",
        "and 100. Skill is 1 minus that of the metric which a task is judged by; wins is the share of tasks and",
        "opponents beaten in it. Fallbacks are forecasts that could not be made, for which it stood in.",
    ]
    note = " ".join(sentences)
    parts = ["# Benchmark\n", markdown_table(head, rows), f"{note}\n"]
    parts += ["## Tasks\n", markdown_table(task_head, task_rows)]
    (output / MARKDOWN).write_text("\n".join(parts), encoding="utf-8")
    body = [html_table(head, rows), f"<p class=note>{text(note)}</p>"]
    body += ["<h2>Tasks</h2>", html_table(task_head, task_rows)]
    (output / HTML).write_text(page("Benchmark", body), encoding="utf-8")


def _board(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    board = record["leaderboard"]
    metrics = [metric for metric in METRICS if any(f"relative_{metric}" in row for row in board)]
    head = ["forecaster", *(f"{metric.upper()} x" for metric in metrics), "fallbacks", "wins", "skill"]
    rows = []
    for row in board:
        relative = [_shown(row.get(f"relative_{metric}"), ".3f") for metric in metrics]
        shares = [_shown(row.get("win_rate"), ".1%"), _shown(row.get("skill"), "+.1%")]
        rows.append([row["name"], *relative, f"{row['fallbacks']:,}", *shares])
    return head, rows


def _shown(value: float | None, form: str = ".4g") -> str:
    return "" if value is None else format(value, form)
