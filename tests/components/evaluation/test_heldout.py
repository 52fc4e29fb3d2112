"""The evaluation's numbers against transformers and against hand calculation, its files, and wrong input."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from modelmill.components.core.errors import UserError
from modelmill.components.core.events import read_lines
from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepResult
from modelmill.components.data.loader import open_rows
from modelmill.components.evaluation.baselines import KneserNeyBigram, row_losses
from modelmill.components.evaluation.config import EvaluationConfig
from modelmill.components.evaluation.heldout import evaluate_heldout
from tests.components.conftest import RunFolder
from tests.components.small_model import SmallModel

QUICK = {"num_prompts": 1, "num_samples": 0, "max_new_tokens": 2}


def evaluate(folder: Path, model: Manifest, tokens: Manifest, **config: Any) -> tuple[StepResult, dict[str, Any]]:
    output = folder / "data"
    output.mkdir(parents=True)
    result = evaluate_heldout(EvaluationConfig(**config), output, model=model, tokens=tokens)
    return result, json.loads((output / "evaluation.json").read_text())


def test_loss_is_that_of_transformers(home: Home, tmp_path: Path, small_model: SmallModel) -> None:
    result, evaluation = evaluate(tmp_path, small_model.trained, small_model.tokens, **QUICK)
    reference = AutoModelForCausalLM.from_pretrained(Path(small_model.trained.uri) / "model").eval()
    rows = torch.from_numpy(np.asarray(open_rows(small_model.tokens, "test"), dtype=np.int64))
    with torch.inference_mode():
        logits = reference(rows[:, :-1]).logits
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").mean(1)
    score = evaluation["scores"]["model"]
    assert score["loss"] == pytest.approx(losses.mean().item(), abs=1e-5)
    assert score["standard_error"] == pytest.approx(losses.std().item() / math.sqrt(len(rows)), abs=1e-5)
    assert score["perplexity"] == pytest.approx(math.exp(score["loss"]))
    counts = small_model.tokens.counts
    bits = score["loss"] / math.log(2) * counts["test_tokens"] / counts["test_bytes"]
    assert score["bits_per_byte"] == pytest.approx(bits)
    assert result.metrics["test_loss"] == score["loss"]
    assert result.metrics["bits_per_byte"] == score["bits_per_byte"]
    assert evaluation["scores"]["uniform"]["loss"] == pytest.approx(math.log(400))


def test_baselines_and_differences(home: Home, tmp_path: Path, small_model: SmallModel) -> None:
    tokens = small_model.tokens
    result, evaluation = evaluate(tmp_path, small_model.trained, tokens, **QUICK)
    bigram = KneserNeyBigram.fit(open_rows(tokens, "train"), 400)
    test = row_losses(bigram, open_rows(tokens, "test"))
    assert result.metrics["bigram_loss"] == pytest.approx(test.mean())
    validation = row_losses(bigram, open_rows(tokens, "validation")).mean()
    assert result.metrics["bigram_validation_loss"] == pytest.approx(validation)
    assert result.metrics["validation_loss"] == small_model.trained.metrics["validation_loss"]
    difference = evaluation["comparison"]["bigram"]
    assert difference["difference"] == pytest.approx(result.metrics["test_loss"] - result.metrics["bigram_loss"])
    own = evaluation["scores"]["model"]["standard_error"]
    assert difference["standard_error"] < own + evaluation["scores"]["bigram"]["standard_error"], "rows are paired"
    assert result.metrics["test_loss"] < result.metrics["unigram_loss"] < math.log(400)
    assert result.metadata["weights_digest"] == small_model.trained.metadata["weights_digest"]


def test_an_untrained_model_is_called_worse(home: Home, tmp_path: Path, small_model: SmallModel) -> None:
    result, _ = evaluate(tmp_path, small_model.untrained, small_model.tokens, **QUICK)
    assert result.metrics["test_loss"] > result.metrics["unigram_loss"]
    page = (tmp_path / "data" / "report.html").read_text()
    assert '<div class="verdict worse">' in page
    assert "The model came without a training history" in page


def test_equal_input_gives_equal_bytes(home: Home, tmp_path: Path, small_model: SmallModel) -> None:
    digests = []
    for number in range(2):
        evaluate(tmp_path / str(number), small_model.trained, small_model.tokens)
        files = sorted((tmp_path / str(number) / "data").iterdir())
        digests.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files})
    assert digests[0] == digests[1]
    assert set(digests[0]) == {"evaluation.json", "samples.json", "report.html", "loss.svg", "learning_rate.svg"}
    page = (tmp_path / "0" / "data" / "report.html").read_text()
    assert str(tmp_path) not in page
    assert small_model.trained.uri not in page


def test_batch_size_changes_nothing(home: Home, tmp_path: Path, small_model: SmallModel) -> None:
    losses = []
    for batch_size in (1, 7, 64):
        folder = tmp_path / str(batch_size)
        result, _ = evaluate(folder, small_model.trained, small_model.tokens, batch_size=batch_size, **QUICK)
        losses.append(result.metrics["test_loss"])
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)


def test_a_cap_scores_a_part_and_says_so(home: Home, tmp_path: Path, small_model: SmallModel) -> None:
    result, evaluation = evaluate(
        tmp_path, small_model.trained, small_model.tokens, max_rows=10, baseline_tokens=6400, **QUICK
    )
    assert result.counts["rows"] == 10
    assert evaluation["scored"]["tokens"] == 640
    assert evaluation["baselines"]["tokens"] == 6400 < evaluation["baselines"]["training_tokens"]
    page = (tmp_path / "data" / "report.html").read_text()
    assert "10 of 47 test rows" in page
    assert "the mean of the whole test split, of which these rows are a part" in page
    rows = open_rows(small_model.tokens, "test")[np.arange(10) * 47 // 10]
    few = open_rows(small_model.tokens, "train")
    few = few[np.arange(100) * len(few) // 100]
    assert result.metrics["bigram_loss"] == pytest.approx(row_losses(KneserNeyBigram.fit(few, 400), rows).mean())


def test_tracking_gets_metrics_report_and_dataset(
    home: Home, tmp_path: Path, small_model: SmallModel, make_run: Any
) -> None:
    run: RunFolder = make_run(home)
    run.enter("evaluate")
    result, _ = evaluate(tmp_path, small_model.trained, small_model.tokens, **QUICK)
    records = [record for _, record in read_lines(run.path / "spool" / "evaluate.jsonl")]
    (metrics,) = [record["values"] for record in records if record["type"] == "metrics"]
    assert metrics == result.metrics
    artifacts = [Path(record["path"]).name for record in records if record["type"] == "artifact"]
    assert artifacts == ["evaluation.json", "learning_rate.svg", "loss.svg", "report.html", "samples.json"]
    (dataset,) = [record for record in records if record["type"] == "dataset"]
    assert (dataset["context"], dataset["digest"]) == ("test", small_model.tokens.digest)


def with_counts(manifest: Manifest, **counts: int) -> Manifest:
    return manifest.model_copy(update={"counts": {**manifest.counts, **counts}})


def test_wrong_input_is_one_line(home: Home, tmp_path: Path, small_model: SmallModel) -> None:
    tokens, model = small_model.tokens, small_model.trained
    cases = {
        r"tokens: the test split has no row": (model, with_counts(tokens, test_rows=0)),
        r"tokens: their vocabulary has 401 tokens, the model's 400": (model, with_counts(tokens, vocab_size=401)),
        r"packing.sequence_length: 65 is more than the model's 64": (model, with_counts(tokens, sequence_length=65)),
        r"model: .* holds no model/ folder": (tokens, tokens),
    }
    for number, (message, (wrong_model, wrong_tokens)) in enumerate(cases.items()):
        with pytest.raises(UserError, match=message):
            evaluate(tmp_path / str(number), wrong_model, wrong_tokens, **QUICK)


def test_a_corrupt_weight_file_is_refused(home: Home, tmp_path: Path, small_model: SmallModel) -> None:
    copy = tmp_path / "model-copy"
    source = Path(small_model.trained.uri)
    for entry in small_model.trained.files:
        (copy / entry.path).parent.mkdir(parents=True, exist_ok=True)
        (copy / entry.path).write_bytes((source / entry.path).read_bytes())
    weights = copy / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    moved = small_model.trained.model_copy(update={"uri": str(copy)})
    with pytest.raises(UserError, match="corrupt"):
        evaluate(tmp_path, moved, small_model.tokens, **QUICK)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_rows": 0},
        {"batch_size": 0},
        {"temperature": 0},
        {"top_k": 0},
        {"seed": -1},
        {"num_prompts": -1},
        {"x": 1},
    ],
)
def test_config_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EvaluationConfig(**wrong)


def test_a_reused_evaluation_pays_for_nothing_heavy() -> None:
    """The shell imports the step's module before it knows that there is nothing to do."""
    code = "import sys, modelmill.components.evaluation.heldout; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "matplotlib", "mlflow", "transformers"} & set(loaded)
