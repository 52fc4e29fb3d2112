"""The gate's decisions against planted truths, its rates of error, its table, and scores that cannot be compared."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from modelmill.components.core.errors import UserError
from modelmill.components.core.events import read_lines
from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepResult, run_step, section
from modelmill.components.evaluation.config import GateConfig, GuardConfig
from modelmill.components.evaluation.gate import Decision, MetricTest, Row, Sides, decide, gate
from modelmill.components.evaluation.gate_report import published_table, relative_change
from modelmill.components.evaluation.records import ExampleScores
from tests.components.conftest import RunFolder

TESTS = ("permutation", "bootstrap")
Columns = dict[str, NDArray[np.float64]]


def sides(candidate: Columns, reference: Columns) -> Sides:
    ids = tuple(f"{number:05d}" for number in range(len(next(iter(reference.values())))))
    return Sides(*(ExampleScores(ids, ("",) * len(ids), columns) for columns in (candidate, reference)))


def drawn(seed: int, count: int = 200, gain: float = 0.0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores of two systems that find the same examples hard, the first better by `gain` on average."""
    generator = np.random.default_rng(seed)
    hardness = generator.beta(2, 3, count)
    noise = generator.normal(0, 0.1, (2, count))
    return hardness + gain + noise[0], hardness + noise[1]


def decided(seed: int = 0, *, gain: float = 0.0, count: int = 200, **config: Any) -> Decision:
    ours, theirs = drawn(seed, count, gain)
    settings = {"metric": "f1", "resamples": 1000, **config}
    return decide(GateConfig(**settings), sides({"f1": ours}, {"f1": theirs}))


@pytest.mark.parametrize("test", TESTS)
def test_systems_that_do_not_differ_pass_at_the_stated_rate(test: str) -> None:
    """500 gates of two systems of equal quality at 90 %: as many pass as one in ten tosses may, within 4 errors."""
    found = [decided(seed, test=test, confidence=0.9, resamples=300).test.outcome for seed in range(500)]
    error = 4 * math.sqrt(0.1 * 0.9 / 500)
    assert abs(found.count("better") / 500 - 0.1) < error
    assert abs(found.count("worse") / 500 - 0.1) < error


@pytest.mark.parametrize("test", TESTS)
def test_a_planted_improvement_is_found(test: str) -> None:
    better = [decided(seed, gain=0.05, test=test) for seed in range(20)]
    assert all(decision.passed for decision in better)
    decision = better[0]
    assert 0 < decision.test.lower < decision.test.gain < decision.test.upper
    assert np.mean([each.test.gain for each in better]) == pytest.approx(0.05, abs=0.01)
    assert decision.test.p_value < 0.01
    assert "f1: fine-tuned" in decision.reasons[0]
    assert decision.reasons[0].endswith(": better")
    worse = [decided(seed, gain=-0.05, test=test, tie="pass") for seed in range(20)]
    assert {decision.test.outcome for decision in worse} == {"worse"}
    assert not any(decision.passed for decision in worse), "what is worse fails whatever a tie does"


@pytest.mark.parametrize("test", TESTS)
def test_the_margin_must_be_beaten_too(test: str) -> None:
    planted = {"gain": 0.05, "count": 2000, "test": test}
    assert decided(margin=0.03, **planted).passed
    short = decided(margin=0.1, **planted)
    assert short.test.outcome == "worse"
    assert short.reasons[0].endswith("not better by more than 0.1")
    near = decided(margin=0.05, **planted)
    assert near.test.outcome == "tie"
    assert "neither to be better by more than 0.05 nor to fall short of that; a tie is set to fail" in near.reasons[0]
    assert not near.passed
    assert decided(margin=0.05, tie="pass", **planted).passed


def test_pairs_find_what_means_alone_would_not() -> None:
    ours, theirs = drawn(1, gain=0.03)
    spread = math.sqrt(ours.var() / 200 + theirs.var() / 200)
    assert ours.mean() - theirs.mean() < 2 * spread, "by the means alone it could be chance"
    assert decided(1, gain=0.03).passed


@pytest.mark.parametrize("test", TESTS)
def test_the_same_scores_are_a_tie(test: str) -> None:
    scores = {"f1": drawn(0)[0]}
    config = {"metric": "f1", "test": test, "resamples": 500}
    decision = decide(GateConfig(**config), sides(scores, scores))
    assert decision.test.outcome == "tie"
    assert (decision.test.gain, decision.test.lower, decision.test.upper, decision.test.p_value) == (0, 0, 0, 1)
    assert not decision.passed
    assert decide(GateConfig(**config, tie="pass"), sides(scores, scores)).passed
    held = decide(GateConfig(**config, tie="pass", guards=({"metric": "f1", "max_drop": 0},)), sides(scores, scores))
    assert held.guards[0].outcome == "held", "nothing fell"


def test_lower_is_better_where_the_recipe_says_so() -> None:
    ours, theirs = drawn(0, gain=-0.05)
    config = {"metric": "loss", "direction": "lower", "resamples": 500}
    decision = decide(GateConfig(**config), sides({"loss": ours}, {"loss": theirs}))
    assert decision.passed
    assert decision.test.gain == pytest.approx(theirs.mean() - ours.mean())
    assert decision.table[0].difference == pytest.approx(ours.mean() - theirs.mean()), "the table does not turn signs"
    assert decision.table[0].upper == pytest.approx(-decision.test.lower)


@pytest.mark.parametrize("test", TESTS)
def test_guards_hold_only_when_it_is_shown(test: str) -> None:
    ours, theirs = drawn(0, gain=0.05)
    for fall, allowed, count, outcome, words in (
        (0.0, 0.03, 200, "held", "loses no more than 0.03"),
        (0.1, 0.03, 200, "broken", "loses more than 0.03"),
        (0.0, 0.03, 15, "broken", "not shown to lose no more than 0.03; more examples may show it"),
    ):
        kept, before = drawn(7, 200, -fall)
        scores = sides({"f1": ours[:count], "exact": kept[:count]}, {"f1": theirs[:count], "exact": before[:count]})
        config = GateConfig(
            metric="f1", test=test, resamples=1000, guards=(GuardConfig(metric="exact", max_drop=allowed),)
        )
        decision = decide(config, scores)
        assert decision.test.outcome == "better"
        assert decision.guards[0].outcome == outcome
        assert decision.guards[0].reason.endswith(words)
        assert decision.passed == (outcome == "held")


def test_guards_on_other_examples() -> None:
    ours, theirs = drawn(0, gain=0.05)
    fallen, before = drawn(8, 300, -0.2)
    main = sides({"f1": ours, "loss": ours}, {"f1": theirs, "loss": theirs})
    other = sides({"loss": fallen}, {"loss": before})
    guard = {"metric": "loss", "max_drop": 0.05}
    same = GateConfig(metric="f1", resamples=500, guards=(GuardConfig(**guard),))
    elsewhere = GateConfig(metric="f1", resamples=500, guards=(GuardConfig(**guard, examples="other"),))
    assert decide(same, main).passed
    decision = decide(elsewhere, main, other)
    assert not decision.passed
    assert decision.guards[0].candidate == pytest.approx(fallen.mean())
    lower = GateConfig(metric="f1", resamples=500, guards=(GuardConfig(**guard, examples="other", direction="lower"),))
    assert decide(lower, main, other).passed, "a loss that falls is no loss"
    with pytest.raises(UserError, match=r"guards\.0\.examples: other examples need the scores guard_candidate and"):
        decide(elsewhere, main)
    with pytest.raises(UserError, match="guards: none looks at the scores given for guards"):
        decide(same, main, other)


def test_few_examples_decide_nothing() -> None:
    decision = decided(gain=1.0, count=4)
    assert decision.test.outcome == "tie", "4 signs fall alike once in 16 times"
    assert "4 examples cannot show anything, give at least 5" in decision.reasons[0]
    assert decided(gain=1.0, count=5).passed
    with pytest.raises(UserError, match="the bootstrap needs 10 examples, here are 4; set test: permutation or give"):
        decided(gain=1.0, count=4, test="bootstrap")


def test_a_metric_that_does_not_exist() -> None:
    scores = {"rougeL": drawn(0)[0], "exact_match": drawn(1)[0]}
    with pytest.raises(UserError, match=r"metric: the candidate has no score 'rougel'; did you mean rougeL\?"):
        decide(GateConfig(metric="rougel"), sides(scores, scores))
    config = GateConfig(metric="rougeL", guards=(GuardConfig(metric="nothing", max_drop=0),))
    with pytest.raises(UserError, match=r"guards\.0\.metric: the candidate has no score 'nothing'; choose from"):
        decide(config, sides(scores, scores))
    with pytest.raises(UserError, match="the reference has no score 'exact_match'; choose from rougeL"):
        decide(GateConfig(metric="exact_match"), sides(scores, {"rougeL": scores["rougeL"]}))


PUBLISHED = {
    "rouge1": (0.36362, 0.44232, 21.643),
    "rouge2": (0.08739, 0.13022, 49.010),
    "rougeL": (0.16345, 0.17769, 8.712),
    "rougeLsum": (0.3204, 0.38989, 21.689),
}


def test_the_published_table() -> None:
    """Base against tuned with the relative change, as a LoRA of a 7B model was published."""
    for base, tuned, change in PUBLISHED.values():
        assert relative_change(base, tuned) == pytest.approx(change, abs=0.0006)
    assert relative_change(0.0, 0.5) is None
    assert relative_change(-2.0, -1.0) == 50.0
    test = MetricTest("rouge1", "same", "higher", 0.4, 0.5, 0.1, 0.0, 0.2, 0.0, 0.01, "better", "")
    rows = tuple(Row(name, base, tuned, tuned - base, 0.0, 0.1) for name, (base, tuned, _) in PUBLISHED.items())
    head, body = published_table(GateConfig(metric="rouge1"), Decision(True, 10, test, (), rows))
    assert head == ["model", "rouge1", "rouge2", "rougeL", "rougeLsum"]
    assert body[0] == ["base", "0.36362", "0.08739", "0.16345", "0.32040"]
    assert body[1] == ["fine-tuned", "0.44232", "0.13022", "0.17769", "0.38989"]
    assert body[2][0] == "% difference (relative)"
    assert [float(cell) for cell in body[2][1:]] == pytest.approx([row[2] for row in PUBLISHED.values()], abs=0.0006)


Lines = list[dict[str, Any]]


def lines_of(scores: NDArray[np.float64]) -> Lines:
    return [
        {"id": f"{number:03d}", "references_digest": "ab", "scores": {"f1": float(value), "exact": float(value > 0.5)}}
        for number, value in enumerate(scores)
    ]


def manifest(folder: Path, lines: Lines, **metadata: Any) -> Manifest:
    folder.mkdir(parents=True)
    (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Manifest.describe(folder, kind="scores", metadata=metadata)


def gated(folder: Path, candidate: Manifest, reference: Manifest, **config: Any) -> tuple[StepResult, Path]:
    folder.mkdir(parents=True)
    settings = {"metric": "f1", "resamples": 300, **config}
    return gate(GateConfig(**settings), folder, candidate=candidate, reference=reference), folder


def test_the_step_writes_the_decision(
    home: Home, tmp_path: Path, make_run: Callable[[Home, str], RunFolder], caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(home, "run-1")
    run.enter("gate")
    ours, theirs = drawn(0, 60, 0.1)
    candidate = manifest(tmp_path / "tuned", lines_of(ours)[::-1], weights_digest="t" * 64)
    reference = manifest(tmp_path / "base", lines_of(theirs), weights_digest="b" * 64)
    guards = ({"metric": "exact", "max_drop": 0.1},)
    with caplog.at_level(logging.INFO, "modelmill"):
        result, folder = gated(tmp_path / "gate", candidate, reference, guards=guards)
    assert result.metadata["passed"] is True
    assert result.counts == {"examples": 60, "passed": 1}
    assert result.metadata["candidate_weights_digest"] == "t" * 64
    assert result.metadata["reference_weights_digest"] == "b" * 64
    assert result.metadata["candidate_scores_digest"] == candidate.digest
    assert result.metrics["gain"] == pytest.approx((ours - theirs).mean())
    assert "guard_exact_gain" in result.metrics
    record = json.loads((folder / "gate.json").read_text())
    assert record["passed"] is True
    assert record["test"]["outcome"] == "better"
    assert record["config"]["metric"] == "f1"
    assert [row["metric"] for row in record["table"]] == ["f1", "exact"]
    report = (folder / "report.md").read_text()
    assert report.startswith("# Gate passed\n")
    assert "| % difference (relative) |" in report
    page = (folder / "report.html").read_text()
    assert '<div class="verdict better">' in page
    assert "guard exact, gain" in page
    assert "the gate passed: f1: fine-tuned" in caplog.text
    spool = [line for _, line in read_lines(run.path / "spool" / "gate.jsonl")]
    assert [Path(line["path"]).name for line in spool if line["type"] == "artifact"] == [
        "gate.json",
        "report.html",
        "report.md",
    ]
    assert {"type": "tags", "values": {"modelmill.gate": "passed"}} in [
        {name: line[name] for name in ("type", "values")} for line in spool if line["type"] == "tags"
    ]


def test_a_failing_gate_is_a_result(home: Home, tmp_path: Path) -> None:
    ours, theirs = drawn(0, 60, -0.2)
    paths = {}
    for name, scores in (("candidate", ours), ("reference", theirs)):
        manifest(tmp_path / name, lines_of(scores)).write(tmp_path / f"{name}.json")
        paths[name] = str(tmp_path / f"{name}.json")
    config = GateConfig(metric="f1", resamples=300, candidate_name="<new>")
    outputs = {"manifest": str(tmp_path / "out.json"), "report.md": str(tmp_path / "out.md")}
    result = run_step(gate, section("gate", config, gate), paths, outputs)
    assert result.metadata["passed"] is False
    assert result.metadata["outcome"] == "worse"
    assert result.counts["passed"] == 0
    assert Manifest.read(tmp_path / "out.json").metadata["reasons"] == result.metadata["reasons"]
    assert (tmp_path / "out.md").read_text().startswith("# Gate failed")
    page = result.path("report.html").read_text()
    assert '<div class="verdict worse">' in page
    assert "&lt;new&gt;" in page
    assert "<new>" not in page


def test_equal_input_gives_equal_bytes_whatever_the_order(home: Home, tmp_path: Path) -> None:
    ours, theirs = (lines_of(scores) for scores in drawn(0, 60, 0.02))
    digests = []
    for number, (first, second) in enumerate(((ours, theirs), (ours[::-1], theirs[7:] + theirs[:7]))):
        candidate, reference = manifest(tmp_path / f"c{number}", first), manifest(tmp_path / f"r{number}", second)
        _, folder = gated(tmp_path / str(number), candidate, reference)
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())])
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[4]["scores"].update(f1=math.nan), "line 5: f1 of example '004' is nan; it must be a"),
        (lambda lines: lines[4]["scores"].update(exact=math.inf), "line 5: exact of example '004' is inf"),
        (lambda lines: lines[4]["scores"].update(f1=None), "line 5: f1 of example '004' is null"),
        (lambda lines: lines[4]["scores"].update(f1=True), "line 5: f1 of example '004' is True"),
        (lambda lines: lines[4]["scores"].pop("f1"), "line 5: example '004' has the scores exact, the first example"),
        (lambda lines: lines[4].update(scores={}), "line 5: scores is an object; it must map metrics to numbers"),
        (lambda lines: lines[4].pop("scores"), "line 5: scores is null"),
        (lambda lines: lines[4].update(id="003"), "line 5: id '003' was used in line 4"),
        (lambda lines: lines[4].update(id="x"), "candidate: 1 of the 20 examples of reference are missing, the first"),
        (lambda lines: lines.pop(), "candidate: 1 of the 20 examples of reference are missing, the first is '019'"),
        (
            lambda lines: lines.append({"id": "zz", "scores": {"f1": 1.0, "exact": 1.0}}),
            "reference: 1 of the 21 examples of candidate are missing, the first is 'zz'",
        ),
        (
            lambda lines: lines[4].update(references_digest="cd"),
            "candidate: example '004' was scored against other references than in reference",
        ),
        (lambda lines: lines.clear(), "has no example; score a set that is not empty"),
    ],
)
def test_scores_that_cannot_be_compared(
    home: Home, tmp_path: Path, change: Callable[[Lines], Any], message: str
) -> None:
    reference = lines_of(drawn(0, 20)[1])
    candidate = copy.deepcopy(reference)
    change(candidate)
    with pytest.raises(UserError) as raised:
        gated(tmp_path / "gate", manifest(tmp_path / "c", candidate), manifest(tmp_path / "r", reference))
    assert message in str(raised.value)
    assert str(raised.value).startswith(("candidate: ", "reference: "))
    assert "\n" not in str(raised.value)


def test_scores_made_by_other_rules_are_refused(home: Home, tmp_path: Path) -> None:
    lines = lines_of(drawn(0, 20)[0])
    stemmed = manifest(tmp_path / "c", lines, scoring={"use_stemmer": True, "layer": 3})
    plain = manifest(tmp_path / "r", lines, scoring={"use_stemmer": False, "layer": 3})
    message = "candidate: was scored with use_stemmer true, reference with false; score both alike"
    with pytest.raises(UserError, match=message):
        gated(tmp_path / "gate", stemmed, plain)
    gated(tmp_path / "unstated", stemmed, manifest(tmp_path / "u", lines))


def test_one_side_of_the_guards_scores_is_not_enough(home: Home, tmp_path: Path) -> None:
    scores = manifest(tmp_path / "c", lines_of(drawn(0, 20)[0]))
    config = GateConfig(metric="f1", guards=(GuardConfig(metric="f1", max_drop=0.1, examples="other"),))
    with pytest.raises(UserError, match="guard_reference: is missing; a guard compares the scores of both sides"):
        gate(config, tmp_path, candidate=scores, reference=scores, guard_candidate=scores)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"confidence": 0.999, "resamples": 500}, "500 can show no confidence of 0.999; draw at least 1000"),
        ({"confidence": 0.5}, "greater than 0.5"),
        ({"margin": -0.1}, "greater than or equal to 0"),
        ({"margin": math.nan}, "finite number"),
        ({"direction": "up"}, "'higher' or 'lower'"),
        ({"guards": ({"metric": "a", "max_drop": 1}, {"metric": "a", "max_drop": 2})}, "guards: a, a names one twice"),
        ({"guards": ({"metric": "a"},)}, "Field required"),
        ({"candidate_name": "base"}, "'base' is reference_name too"),
    ],
)
def test_configs_that_mean_nothing(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GateConfig(metric="f1", **config)
