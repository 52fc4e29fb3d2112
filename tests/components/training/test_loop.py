"""One rank: the loop against plain torch, accumulation, resuming, and numbers that go wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.data.loader import BatchSource, open_rows
from modelmill.components.llama.config import LlamaConfig
from modelmill.components.llama.model import LlamaDecoder
from modelmill.components.training.optimizer import make_optimizer
from modelmill.components.training.schedule import learning_rate
from modelmill.components.training.worker import StopRequestedError
from tests.components.training.runs import digest, history, make_loop, single_rank
from tests.components.training.samples import LENGTH, MODEL, VOCAB, make_tokens, training_config

ALONE = {"parallel": {"processes_per_node": 1}}


@pytest.fixture
def tokens(home: object, tmp_path: Path) -> Manifest:
    return make_tokens(tmp_path / "tokens")


def test_the_loop_is_plain_training(tokens: Manifest, tmp_path: Path) -> None:
    config = training_config(**ALONE, micro_batch_size=8, validation_rows=0)
    loop = make_loop(tokens, config, single_rank(tmp_path / "run"), dtype=torch.float64)
    metrics = loop.run()

    model = LlamaDecoder(LlamaConfig.model_validate({**MODEL, "vocab_size": VOCAB}), seed=0, dtype=torch.float64)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-5,
        foreach=False,
        fused=False,
    )
    source = BatchSource(open_rows(tokens, "train"), 0, 8)
    for step, record in enumerate(history(tmp_path / "run")):
        rows = torch.from_numpy(source.batch(step))
        logits = model(rows[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        optimizer.zero_grad()
        assert record["step"] == step + 1
        assert record["tokens"] == (step + 1) * 8 * LENGTH
        assert record["learning_rate"] == learning_rate(step, config)
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-9)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-9)
    for own, plain in zip(loop.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-9, atol=1e-12)
    assert metrics["train_loss"] < np.log(VOCAB)
    assert metrics["tokens_per_second"] > 0
    assert "mfu" not in metrics  # nobody knows this CPU's peak


def test_how_a_batch_is_cut_does_not_matter(tokens: Manifest, tmp_path: Path) -> None:
    found = []
    for micro in (1, 2, 8):
        config = training_config(**ALONE, micro_batch_size=micro)
        make_loop(tokens, config, single_rank(tmp_path / str(micro)), dtype=torch.float64).run()
        found.append(history(tmp_path / str(micro)))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert one == pytest.approx(two, rel=1e-9)


def test_validation_is_the_mean_over_the_rows_asked_for(tokens: Manifest, tmp_path: Path) -> None:
    loop = make_loop(tokens, training_config(**ALONE, validate_every=None), single_rank(tmp_path / "run"))
    loop.run()
    records = [record for record in history(tmp_path / "run") if "validation_loss" in record]
    assert [record["step"] for record in records] == [8]
    rows = torch.from_numpy(open_rows(tokens, "validation")[:7].astype(np.int64))
    with torch.no_grad():
        direct = loop.model(rows[:, :-1], rows[:, 1:]).item()
    assert records[0]["validation_loss"] == pytest.approx(direct, rel=1e-5)


def test_points_are_logged_when_asked(tokens: Manifest, tmp_path: Path) -> None:
    loop = make_loop(tokens, training_config(**ALONE, log_every=3), single_rank(tmp_path / "run"))
    loop.run()
    assert [record["step"] for record in history(tmp_path / "run") if "loss" in record] == [1, 3, 6, 8]


@pytest.mark.parametrize("stop_in", [0, 3, 4])
def test_a_resumed_run_ends_with_the_same_bits(tokens: Manifest, tmp_path: Path, stop_in: int) -> None:
    config = training_config(**ALONE)
    whole = make_loop(tokens, config, single_rank(tmp_path / "whole"))
    whole.run()
    scratch = tmp_path / "parts"
    stopped = make_loop(tokens, config, single_rank(scratch), stop_in=stop_in)
    with pytest.raises(StopRequestedError):
        stopped.run()
    assert stopped.progress.step < 8
    # What was logged after the checkpoint, as after a hard kill, must not appear twice.
    with (scratch / "history.jsonl").open("a") as file:
        file.write('{"step":7,"loss":0.0,"learning_rate":0.0,"grad_norm":0.0,"tokens":0}\n{"step":8,"lo')
    resumed = make_loop(tokens, config, single_rank(scratch))
    resumed.run()
    assert digest(resumed.model) == digest(whole.model)
    assert (scratch / "history.jsonl").read_bytes() == (tmp_path / "whole" / "history.jsonl").read_bytes()


def test_a_finished_run_resumes_to_its_end(tokens: Manifest, tmp_path: Path) -> None:
    config = training_config(**ALONE)
    first = make_loop(tokens, config, single_rank(tmp_path / "run"))
    metrics = first.run()
    second = make_loop(tokens, config, single_rank(tmp_path / "run"))
    again = second.run()
    assert digest(first.model) == digest(second.model)
    assert again["train_loss"] == metrics["train_loss"]
    assert again["validation_loss"] == metrics["validation_loss"]


def test_an_infinite_learning_problem_names_the_step(tokens: Manifest, tmp_path: Path) -> None:
    config = training_config(**ALONE, learning_rate=1e30, clip_norm=None, warmup_steps=0)
    with pytest.raises(UserError, match=r"training\.learning_rate: .* at step \d"):
        make_loop(tokens, config, single_rank(tmp_path / "run")).run()


def test_mixed_precision_follows_full_precision(tokens: Manifest, tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16-mixed"):
        config = training_config(**ALONE, precision=precision, steps=20)
        loop = make_loop(tokens, config, single_rank(tmp_path / precision))
        loop.run()
        assert {p.dtype for p in loop.model.parameters()} == {torch.float32}
        losses[precision] = [record["loss"] for record in history(tmp_path / precision) if "loss" in record]
    assert losses["bf16-mixed"] != losses["fp32"]
    assert losses["bf16-mixed"] == pytest.approx(losses["fp32"], abs=0.05)


def test_without_clipping_the_norm_is_still_reported(tokens: Manifest, tmp_path: Path) -> None:
    norms = {}
    for clip in (1e6, None):
        make_loop(tokens, training_config(**ALONE, clip_norm=clip), single_rank(tmp_path / str(clip))).run()
        norms[clip] = [record["grad_norm"] for record in history(tmp_path / str(clip)) if "grad_norm" in record]
    assert norms[None] == pytest.approx(norms[1e6], rel=1e-5)
    assert min(norms[None]) > 0


@pytest.mark.parametrize("decay_norms", [False, True])
def test_which_weights_decay(decay_norms: bool) -> None:
    model = LlamaDecoder(LlamaConfig.model_validate({**MODEL, "vocab_size": VOCAB}))
    optimizer = make_optimizer(model, training_config(decay_norm_weights=decay_norms))
    decayed = {p for group in optimizer.param_groups if group["weight_decay"] == 0.1 for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (parameter in decayed) == (decay_norms or "norm" not in name)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
