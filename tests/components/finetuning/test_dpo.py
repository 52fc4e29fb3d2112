"""Preference tuning on one rank: against a loop by hand, resuming, what it learns and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.weights import weights_digest
from modelmill.components.data.instruction_rows import IGNORE
from modelmill.components.data.preference_rows import PreferenceSource, open_preferences
from modelmill.components.finetuning import dpo_objective, dpo_reference
from modelmill.components.finetuning.dpo_config import PreferenceObjectiveConfig
from modelmill.components.finetuning.dpo_objective import (
    PreferenceModel,
    pack_pairs,
    preference_losses,
    sequence_log_probs,
    unpack_pairs,
)
from modelmill.components.training.pretrained import load_causal_lm
from modelmill.components.training.schedule import learning_rate
from tests.components.finetuning.preference_data import dpo_config, make_preferences, run
from tests.components.finetuning.samples import ADAPTER, LENGTH, VOCAB, make_base
from tests.components.training.runs import history

OBJECTIVES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "conservative": {"label_smoothing": 0.2, "beta": 0.3},
    "normalized": {"length_normalized": True, "beta": 2.0},
    "ipo": {"loss": "ipo", "length_normalized": True},
    "rpo": {"sft_weight": 0.5},
}


@pytest.fixture(autouse=True)
def launched_now(home: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELMILL_LAUNCHED", "0")


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_preferences(tmp_path_factory.mktemp("data") / "preferences")


def full_log_prob(model: PreTrainedModel, tokens: np.ndarray, mask: np.ndarray) -> torch.Tensor:
    """Of one answer, from all logits, with nothing beside it in the batch."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    logits = model(input_ids=ids[None, :-1]).logits[0].log_softmax(-1)
    return logits[torch.arange(len(ids) - 1), ids[1:]][torch.from_numpy(mask[1:])].sum()


def by_hand(config: dict[str, Any], log_probs: list[torch.Tensor], base: list[torch.Tensor], sizes: Any) -> Any:
    """The formulas as the papers have them."""
    beta, wrong = config.get("beta", 0.1), config.get("label_smoothing", 0.0)
    scale = [float(n) if config.get("length_normalized") else 1.0 for n in sizes]
    h = (log_probs[0] - base[0]) / scale[0] - (log_probs[1] - base[1]) / scale[1]
    if config.get("loss") == "ipo":
        loss = (h - 1 / (2 * beta)) ** 2
    else:
        right = torch.log(1 + torch.exp(-beta * h))
        loss = (1 - wrong) * right + wrong * torch.log(1 + torch.exp(beta * h))
    return loss + config.get("sft_weight", 0.0) * -log_probs[0] / float(sizes[0])


@pytest.mark.parametrize("name", ["sigmoid", "rpo"])
def test_all_weights_follow_a_loop_by_hand(exact: Path, preferences: Manifest, tmp_path: Path, name: str) -> None:
    config = dpo_config(method="full", steps=4, weight_decay=0.0, objective=OBJECTIVES[name])
    made, result = run(config, tmp_path, preferences, exact)
    model = AutoModelForCausalLM.from_pretrained(str(exact), dtype=torch.float64)
    reference = AutoModelForCausalLM.from_pretrained(str(exact), dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    rows = open_preferences(preferences, "train")
    losses = []
    for step in range(config.training.steps):
        total: Any = 0.0
        for pair in PreferenceSource(rows, 0, 8).indices(step):
            sides = [rows.conversation(int(pair), side) for side in (0, 1)]
            with torch.no_grad():
                base = [full_log_prob(reference, *side) for side in sides]
            tuned = [full_log_prob(model, *side) for side in sides]
            total = total + by_hand(OBJECTIVES[name], tuned, base, rows.targets[pair]) / 8
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = learning_rate(step, config.training)
        optimizer.step()
        losses.append(total.item())
    assert [r["loss"] for r in history(tmp_path) if "loss" in r] == pytest.approx(losses, rel=1e-8)
    assert losses[-1] < losses[0]
    again = AutoModelForCausalLM.from_pretrained(str(made.path("model/config.json").parent), dtype=torch.float64)
    for (parameter, found), expected in zip(again.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9, msg=parameter)
    assert result.metadata["weights_digest"] == weights_digest(tmp_path / "data" / "model")


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_loss_and_gradient_of_a_batch_are_those_of_the_formulas(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    log_probs = (-20 * torch.rand(6, 2, generator=generator, dtype=torch.float64)).requires_grad_()
    reference = -20 * torch.rand(6, 2, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 20, (6, 2), generator=generator)
    config = PreferenceObjectiveConfig.model_validate(OBJECTIVES[name])
    losses, rewards = preference_losses(config, log_probs, reference, lengths)
    (found,) = torch.autograd.grad(losses.sum(), log_probs)
    expected = torch.stack(
        [by_hand(OBJECTIVES[name], list(log_probs[n]), list(reference[n]), lengths[n]) for n in range(6)]
    )
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), log_probs)[0])
    scale = lengths if config.length_normalized else 1
    torch.testing.assert_close(rewards, (config.beta * (log_probs - reference) / scale).detach())


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_log_probabilities_in_chunks_are_those_of_all_logits(chunk: int) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(4, 9, 6, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(30, 6, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, 30, (4, 9), generator=generator)
    targets[torch.rand(4, 9, generator=generator) < 0.4] = IGNORE
    targets[2] = IGNORE
    upstream = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    found = sequence_log_probs(hidden, weight, targets, chunk)
    losses = F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), reduction="none")
    expected = -losses.view(4, 9).sum(1)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found, (hidden, weight), upstream)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, (hidden, weight), upstream), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_padding_and_neighbours_change_nothing(exact: Path, preferences: Manifest) -> None:
    model = PreferenceModel(load_causal_lm(exact, dtype=torch.float64, parameter="base")).eval()
    rows = open_preferences(preferences, "train")
    pairs = np.array([3, 11, 4])
    assert LENGTH // 8 <= rows.width(pairs) < LENGTH
    with torch.no_grad():
        narrow, wide = (model(torch.from_numpy(pack_pairs(rows, pairs, w))) for w in (rows.width(pairs), LENGTH))
        expected = [[full_log_prob(model.model, *rows.conversation(int(p), s)) for s in (0, 1)] for p in pairs]
    torch.testing.assert_close(narrow, wide)
    torch.testing.assert_close(narrow, torch.tensor(expected))
    numbers, _, targets = unpack_pairs(torch.from_numpy(pack_pairs(rows, pairs, LENGTH, first=100)))
    assert numbers.tolist() == [103, 111, 104]
    assert (targets != IGNORE).sum(2).tolist() == rows.targets[pairs].tolist()


@pytest.mark.parametrize("method", ["lora", "dora", "qlora"])
def test_an_adapter_begins_at_the_reference_and_is_told_with_its_rewards(
    llama: Path, preferences: Manifest, tmp_path: Path, method: str
) -> None:
    made, result = run(dpo_config(method=method), tmp_path, preferences, llama)
    records = history(tmp_path)
    first = records[0]
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert first["reward_margin"] == pytest.approx(0.0, abs=1e-5)
    trained = [record for record in records if "loss" in record]
    validated = [record for record in records if "validation_loss" in record]
    assert [record["pairs"] for record in trained] == [8 * n for n in range(1, 7)]
    for record in trained:
        difference = record["reward_chosen"] - record["reward_rejected"]
        assert record["reward_margin"] == pytest.approx(difference, abs=1e-9)
        assert (8 * record["reward_accuracy"]) % 1 == pytest.approx(0)
    assert validated[-1]["validation_reward_margin"] > 0
    assert validated[-1]["validation_loss"] < math.log(2)
    assert made.kind == "adapter"
    assert result.counts["pairs"] == 48
    assert result.counts["trained_parameters"] < result.counts["parameters"]
    assert result.metadata["base_digest"] == weights_digest(llama)
    assert result.metadata["objective"] == dpo_config().objective.model_dump(mode="json")
    assert "pairs_per_second" in result.metrics
    assert ("quantization" in result.metadata) == (method == "qlora")


def test_the_margin_of_held_out_pairs_rises(llama: Path, preferences: Manifest, tmp_path: Path) -> None:
    config = dpo_config(steps=24, learning_rate=5e-3, validate_every=8, validation_rows=15, micro_batch_size=8)
    run(config, tmp_path, preferences, llama)
    found = [record for record in history(tmp_path) if "validation_loss" in record]
    assert found[-1]["validation_reward_margin"] > max(0.5, found[0]["validation_reward_margin"])
    assert found[-1]["validation_reward_accuracy"] >= 0.8


def test_a_killed_run_ends_with_the_same_bits_and_computes_the_reference_once(
    llama: Path, preferences: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dpo_config(adapter={**ADAPTER, "dropout": 0.2})
    run(config, tmp_path / "whole", preferences, llama)
    with monkeypatch.context() as patch:
        batch = dpo_objective.PreferenceBatches.batch

        def dies(self: Any, step: int, rank: int, world: int) -> np.ndarray:
            if step == 5:  # two steps after the checkpoint of the third
                raise KeyboardInterrupt
            return batch(self, step, rank, world)

        patch.setattr(dpo_objective.PreferenceBatches, "batch", dies)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "killed", preferences, llama)
    assert [r["step"] for r in history(tmp_path / "killed") if "loss" in r][-1] > 3

    def again(*_: Any) -> None:
        raise AssertionError("the reference is there")

    monkeypatch.setattr(dpo_reference, "_compute", again)
    run(config, tmp_path / "killed", preferences, llama)
    for name in ("history.jsonl", "data/adapter/adapter_model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_only_the_pairs_that_are_met_get_a_reference(llama: Path, preferences: Manifest, tmp_path: Path) -> None:
    run(dpo_config(steps=2), tmp_path, preferences, llama)
    (path,) = tmp_path.glob("reference-*.npy")
    table = np.load(path)
    met = np.unique(
        np.concatenate([PreferenceSource(open_preferences(preferences, "train"), 0, 8).indices(n) for n in (0, 1)])
    )
    assert np.flatnonzero(np.isfinite(table[:60, 0])).tolist() == met.tolist()
    assert np.isfinite(table[60:67]).all()
    assert (table[met] < 0).all()


def test_a_damaged_reference_is_computed_again(llama: Path, preferences: Manifest, tmp_path: Path) -> None:
    run(dpo_config(steps=2), tmp_path, preferences, llama)
    (path,) = tmp_path.glob("reference-*.npy")
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    run(dpo_config(steps=2), tmp_path, preferences, llama)
    assert path.read_bytes() == whole


def test_what_does_not_fit_is_one_line(llama: Path, preferences: Manifest, tmp_path: Path) -> None:
    def tried(match: str, work: Callable[[], Any]) -> None:
        with pytest.raises(UserError, match=match) as error:
            work()
        assert "\n" not in str(error.value)

    def step(match: str, config: Any = None, data: Manifest = preferences, base: Path = llama) -> None:
        tried(match, lambda: run(config or dpo_config(), tmp_path / "run", data, base))

    def counted(**changes: int) -> Manifest:
        return preferences.model_copy(update={"counts": {**preferences.counts, **changes}})

    step(r"^adapter.targets: 'x' matches no linear layer", dpo_config(adapter={"targets": ["x"]}))
    step(r"^training.global_batch_size: 64 is more than the 60 pairs", dpo_config(global_batch_size=64))
    step(r"^preferences: .* is of kind tokens", data=preferences.model_copy(update={"kind": "tokens"}))
    step(r"^preferences: .* has no \(0, 25\) arrays", data=counted(train_rows=0))
    step(r"^preferences: the training split is empty", data=counted(train_pairs=0))
    step(r"^training.validation_rows: 7 pairs are asked for", data=counted(validation_pairs=0))
    short = make_base(tmp_path / "short", max_position_embeddings=16)
    step(rf"^preferences.sequence_length: {LENGTH} is more than the 16", base=short)
    small = make_base(tmp_path / "small", vocab_size=50)
    step(rf"^preferences.tokenizer: its {VOCAB} tokens are more than the 50", base=small)
    run(dpo_config(steps=2), tmp_path / "kept", preferences, llama)
    other = dpo_config(steps=2, objective={"beta": 0.2})
    tried("was written by another configuration", lambda: run(other, tmp_path / "kept", preferences, llama))


def test_sections_refuse_what_means_nothing() -> None:
    for objective, match in (
        ({"loss": "ipo", "label_smoothing": 0.1}, "ipo has none"),
        ({"label_smoothing": 0.5}, "less than 0.5"),
        ({"beta": 0}, "greater than 0"),
        ({"loss": "hinge"}, "'sigmoid' or 'ipo'"),
    ):
        with pytest.raises(ValueError, match=match):
            dpo_config(objective=objective)
