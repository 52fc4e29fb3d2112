"""The page says what the numbers say, holds no foreign markup and fetches nothing."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from modelmill.components.evaluation.figures import curves, learning_rate_curve, loss_curve
from modelmill.components.evaluation.report import render_report, verdict
from tests.components.evaluation.samples import MEASURED

EVALUATION: dict[str, Any] = {
    **MEASURED,
    "validation": {"bigram": {"loss": 4.1, "bits_per_byte": 1.95}, "unigram": {"loss": 5.1, "bits_per_byte": 2.45}},
    "baselines": {"tokens": 10, "training_tokens": 20, "pairs": 5, "discount": 0.5, "lower_discount": 0.4},
    "provenance": {"weights_digest": "ab" * 32, "parameters": 1234567, "optimizer_steps": None, "code": ""},
}
HISTORY = [{"step": step, "loss": 8 / step, "learning_rate": 1e-3 / step} for step in range(1, 50)]
HISTORY.append({"step": 49, "validation_loss": 0.5})
SAMPLE = {"prompt": "Once", "reference": " upon", "continuations": [{"method": "greedy", "text": " more"}]}


def test_verdict_follows_the_numbers() -> None:
    level, sentence = verdict(EVALUATION)
    assert level == "better"
    assert "1.440 bits per byte" in sentence
    assert "25.0% less than the bigram (1.920)" in sentence
    assert "40.0% less than the unigram (2.400)" in sentence
    worse = copy.deepcopy(EVALUATION)
    worse["scores"]["model"]["bits_per_byte"] = 2.112
    worse["comparison"]["bigram"]["difference"] = 0.4
    level, sentence = verdict(worse)
    assert level == "worse"
    assert "10.0% more than the bigram" in sentence
    assert "12.0% less than the unigram" in sentence
    close = copy.deepcopy(EVALUATION)
    close["comparison"]["bigram"]["difference"] = -0.09
    assert verdict(close)[0] == "unclear"


class Page(HTMLParser):
    """Tags, attributes and text of a page, and whether every tag is closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.feed(page)
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in ("meta", "br"):
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def test_page_is_well_formed_and_fetches_nothing() -> None:
    page = render_report(EVALUATION, [SAMPLE], curves(HISTORY, EVALUATION["validation"]))
    parsed = Page(page)
    assert "<script" not in page
    for tag, name, value in parsed.attributes:
        if name in ("src", "href", "xlink:href", "data", "action"):
            assert value is not None
            assert value.startswith("#"), f"{tag} {name}={value}"
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page
    assert "1,234,567" in page
    assert page.count("<svg") == 2


@pytest.mark.parametrize("field", ["prompt", "reference"])
def test_sampled_markup_stays_text(field: str) -> None:
    attack = "</div><script>alert(1)</script>\x00\x1b"
    sample = {**SAMPLE, field: attack, "continuations": [{"method": "greedy", "text": attack}]}
    page = render_report(EVALUATION, [sample], {})
    Page(page)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "\x00" not in page
    assert "\x1b" not in page


def test_page_without_history_samples_or_validation() -> None:
    page = render_report({**EVALUATION, "validation": {}}, [], {})
    Page(page)
    assert "without a training history" in page
    assert "No samples were asked for" in page
    without_lines = curves(HISTORY, {})
    assert "baseline" not in without_lines["loss"]
    assert "no validation split" in render_report({**EVALUATION, "validation": {}}, [], without_lines)
    assert curves([], {}) == {}


def test_curves_are_the_same_bytes_and_hold_what_they_should() -> None:
    first, second = (loss_curve(HISTORY, {"bigram": 4.0, "unigram": 5.0}) for _ in range(2))
    assert first == second
    assert first.count("stroke-dasharray") >= 2
    for label in ("training", "validation", "bigram baseline", "unigram baseline", "optimizer step"):
        assert label in first
    rates = learning_rate_curve(HISTORY)
    assert rates == learning_rate_curve(HISTORY)
    assert rates != learning_rate_curve(HISTORY[:20])


def test_the_gradient_norm_is_drawn_when_it_was_logged() -> None:
    assert "grad_norm" not in curves(HISTORY, {})
    norms = [{"step": step, "loss": 1.0, "learning_rate": 1e-3, "grad_norm": 2 / step} for step in range(1, 30)]
    plain = curves(norms, {})["grad_norm"]
    assert "gradient norm" in plain
    assert "running mean" not in plain
    watched = [{**record, "grad_norm_mean": 0.5} for record in norms]
    marked = curves([*watched, {"step": 30, "skipped": "nonfinite"}], {})
    assert "running mean" in marked["grad_norm"]
    assert "update skipped" in marked["grad_norm"]
    assert marked["grad_norm"] in render_report(EVALUATION, [], marked)


def test_long_histories_are_thinned() -> None:
    long = [{"step": step, "loss": 5.0 + (step % 7), "learning_rate": 1e-3} for step in range(200_000)]
    assert len(loss_curve(long, {})) < 120_000
