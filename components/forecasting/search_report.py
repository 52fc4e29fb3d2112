"""The report of a search: every trial beside the untrained base, and the figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelmill.components.evaluation.page import html_table, markdown_table, page, text
from modelmill.components.forecasting.search_config import SearchConfig

_STATES = {"complete": "", "pruned": "given up", "failed": "failed", "lost": "lost"}


def write_report(output: Path, told: Mapping[str, Any], config: SearchConfig) -> None:
    """Write `report.html` and `report.md`.

    Args:
        output: of the step.
        told: content of `trials.json`.
        config: of the search.
    """
    # Imported here, so that a reused step does not pay for matplotlib.
    from modelmill.components.forecasting.search_figures import by_learning_rate, by_step, by_trial

    head, rows, kinds = _table(told)
    verdict, note = _verdict(told), _note(told, config)
    (output / "report.md").write_text(
        f"# Search\n\n{verdict}\n\n{markdown_table(head, rows)}\n{note}\n", encoding="utf-8"
    )
    kind = "better" if told["winner"] else "unclear"
    body = [f'<p class="verdict {kind}">{text(verdict)}</p>', html_table(head, rows, kinds)]
    body += [f"<p class=note>{text(note)}</p>"]
    if any(trial["course"] for trial in told["trials"]):
        body += ["<h2>Validation by learning rate</h2>", by_learning_rate(told)]
        body += ["<h2>Validation by trial</h2>", by_trial(told)]
    if any(len(trial["course"]) > 1 for trial in told["trials"]):
        body += ["<h2>Validation while trials are trained</h2>", by_step(told)]
    (output / "report.html").write_text(page("Search", body), encoding="utf-8")


def _verdict(told: Mapping[str, Any]) -> str:
    metric, base = told["metric"].upper(), told["zero_shot"]
    complete = [trial for trial in told["trials"] if trial["state"] == "complete"]
    if not told["winner"]:
        if not complete:
            return f"No trial of {len(told['trials'])} came to an end; the result is the untrained base."
        best = min(trial["value"] for trial in complete)
        return f"No trial beats the untrained base ({metric} {best:.4g} against {base:.4g}); the result is the base."
    won = next(trial for trial in told["trials"] if trial["number"] == told["winner"])
    rate = f"Trial {won['number']}, learning rate {won['params']['learning_rate']:.3g}"
    if base is None:
        return f"{rate}, has {metric} {won['value']:.4g}; the untrained base could not be judged."
    gap = f"{won['value'] / base - 1:+.1%}" if base else "from 0"
    return f"{rate}, has {metric} {won['value']:.4g} against {base:.4g} of the untrained base ({gap})."


def _table(told: Mapping[str, Any]) -> tuple[list[str], list[list[str]], list[str]]:
    names = list(dict.fromkeys(name for trial in told["trials"] for name in trial["params"]))
    head = ["trial", *(name.replace("_", " ") for name in names), "", told["metric"].upper(), "against the base"]
    base = told["zero_shot"]
    rows = [["0, untrained", *("" for _ in names), "", "" if base is None else f"{base:.4g}", ""]]
    kinds = [""]
    for trial in told["trials"]:
        value = trial["value"]
        gap = "" if value is None or not base else f"{value / base - 1:+.1%}"
        state = trial["reason"] or _STATES[trial["state"]]
        state = "chosen" if trial["number"] == told["winner"] else state
        shown = [f"{trial['params'][name]:.4g}" if name in trial["params"] else "" for name in names]
        rows.append([str(trial["number"]), *shown, state, "" if value is None else f"{value:.4g}", gap])
        kinds.append("" if not gap else "better" if value < base else "worse")
    return head, rows, kinds


def _note(told: Mapping[str, Any], config: SearchConfig) -> str:
    windows = f"{config.validation_windows} window{'s' if config.validation_windows > 1 else ''}"
    sentences = [
        f"Trials are compared on the {windows} of each series right before those of the backtest, which no trial is",
        f"trained on. Values are drawn by TPE with seed {config.seed}; lower is better. The best of several trials",
        "looks better on the windows it was chosen by than it is: the backtest tells how good it is.",
    ]
    if told["refit"]:
        sentences.append(
            "The winner was then trained again with the validation windows; its values here are from before."
        )
    return " ".join(sentences)
