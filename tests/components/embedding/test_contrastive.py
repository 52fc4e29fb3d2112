"""What one rank does: the losses, the batches, and going on after a stop. One process, no launcher."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn import functional

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.embedding import contrastive
from modelmill.components.embedding.encoder import embed, load_encoder
from modelmill.components.embedding.pairs import read_pairs
from modelmill.components.embedding.retrieval import Held, rank, score
from modelmill.components.training.worker import StopRequestedError
from tests.components.embedding.runs import one_rank, train
from tests.components.embedding.samples import NOUNS, make_base, make_pairs, records

__all__ = ["one_rank"]
pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """A base without dropout."""
    return make_base(tmp_path_factory.mktemp("still"), dropout=0.0)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Pairs that have all, one or none of three words in common."""
    generator, rows = np.random.default_rng(0), []
    for number in range(120):
        a, b, c, d, e, f = generator.permutation(NOUNS)[:6]
        second, score = ((f"{c} {b} {a}", 1.0), (f"{d} {e} {a}", 0.4), (f"{d} {e} {f}", 0.0))[number % 3]
        rows.append({"sentence1": f"{a} {b} {c}", "sentence2": second, "score": score})
    folder = tmp_path_factory.mktemp("scored")
    return make_pairs(folder, rows, fields={"score": "score"}, test_fraction=0.05, validation_fraction=0.0)


class TestLosses:
    def test_trajectory_is_that_of_a_loop_by_hand(self, pairs: Manifest, still: Manifest, tmp_path: Path) -> None:
        """One batch of all pairs: cross entropy of scaled cosines, AdamW, linear warmup and decay."""
        rows, steps = read_pairs(pairs, "train", together=True), 6
        done = train(tmp_path, pairs, still, steps=steps, batch_size=len(rows), warmup_fraction=0.3, weight_decay=0.1)
        model = load_encoder(Path(still.uri) / "model", "cpu")
        decayed = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() == 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        optimizer, losses = torch.optim.AdamW(groups, lr=1e-3), []
        model.train()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * min(step / 2, (steps - step) / (steps - 2))
            sides = [model(model.preprocess([row[side] for row in rows])) for side in ("question", "positive")]
            first, second = (functional.normalize(side["sentence_embedding"], dim=1) for side in sides)
            loss = functional.cross_entropy(20 * first @ second.T, torch.arange(len(rows)))
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        assert done.losses == pytest.approx(losses, rel=1e-5)
        weights = load_file(done.folder / "model" / "model.safetensors")
        for name, value in model[0].model.state_dict().items():
            # No loss depends on the bias of the keys: its gradient is rounding, which AdamW scales up.
            if name in weights and not name.endswith("key.bias"):
                torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)
        assert losses[-1] < losses[0]

    def test_cached_loss_has_the_trajectory_of_the_plain_one(
        self, pairs: Manifest, still: Manifest, tmp_path: Path
    ) -> None:
        plain = train(tmp_path / "plain", pairs, still)
        name = "cached_multiple_negatives_ranking"
        cached = train(tmp_path / "cached", pairs, still, loss=name, mini_batch_size=5)
        assert cached.losses == pytest.approx(plain.losses, rel=1e-5)

    def test_symmetric_loss_is_the_mean_of_both_directions(
        self, pairs: Manifest, still: Manifest, tmp_path: Path
    ) -> None:
        rows = read_pairs(pairs, "train", together=True)
        done = train(tmp_path, pairs, still, steps=1, batch_size=len(rows), loss="symmetric_ranking")
        model = load_encoder(Path(still.uri) / "model", "cpu")
        with torch.inference_mode():
            first, second = (
                torch.from_numpy(model.encode([row[side] for row in rows])) for side in ("question", "positive")
            )
        cosines, labels = 20 * first @ second.T, torch.arange(len(rows))
        both = [float(functional.cross_entropy(side, labels)) for side in (cosines, cosines.T)]
        assert done.losses == pytest.approx([np.mean(both)], rel=1e-5)
        assert abs(both[0] - both[1]) > 1e-3

    def test_cosent_orders_pairs_by_their_scores(self, scored: Manifest, still: Manifest, tmp_path: Path) -> None:
        done = train(tmp_path, scored, still, loss="cosent", steps=30, log_every=1)
        assert np.mean(done.losses[-5:]) < np.mean(done.losses[:5])
        model = SentenceTransformer(str(done.folder / "model"), device="cpu")
        rows = read_pairs(scored, "train", together=False)
        first, second = (model.encode([row[side] for row in rows]) for side in ("question", "positive"))
        cosines, values = (first * second).sum(axis=1), np.array([row["score"] for row in rows])
        assert cosines[values == 1].mean() > cosines[values == 0.4].mean() > cosines[values == 0].mean()

    def test_a_pair_with_a_low_score_is_no_positive(self, scored: Manifest, still: Manifest, tmp_path: Path) -> None:
        together = read_pairs(scored, "train", together=True)
        assert len(together) < len(read_pairs(scored, "train", together=False))
        done = train(tmp_path, scored, still, steps=1, batch_size=8)
        assert np.isfinite(done.losses[0])


class _Spy(nn.Module):
    """Keeps what a loss was given."""

    def __init__(self, loss: nn.Module, seen: list[list[Tensor]]) -> None:
        super().__init__()
        self.loss, self.seen = loss, seen

    def forward(self, features: Any, labels: Any) -> Tensor:
        self.seen.append([side["input_ids"] for side in features])
        return self.loss(features, labels)


def test_no_text_is_its_own_wrong_answer(still: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of all questions have one of three answers."""
    rows = [
        {**record, "sentence2": f"the {('cat', 'dog', 'fox')[n % 3]}"} if n % 2 else record
        for n, record in enumerate(records())
    ]
    pairs = make_pairs(tmp_path / "pairs", rows)
    seen: list[list[Tensor]] = []
    made = contrastive.make_loss
    monkeypatch.setattr(contrastive, "make_loss", lambda *arguments: _Spy(made(*arguments), seen))
    train(tmp_path / "run", pairs, still, steps=6, batch_size=12)
    assert len(seen) == 6
    assert all(len(side.unique(dim=0)) == 12 for batch in seen for side in batch)


def test_pairs_that_do_not_belong_together_teach_nothing(base: Manifest, tmp_path: Path) -> None:
    """The control: the same texts with their answers exchanged, judged on the true pairs."""
    rows, found = records(), {}
    others = np.random.default_rng(0).permutation(len(rows))
    exchanged = [{**row, "sentence2": rows[other]["sentence2"]} for row, other in zip(rows, others, strict=True)]
    true = make_pairs(tmp_path / "true", rows, validation_fraction=0.0)
    held = Held.of(read_pairs(true, "test", together=True))
    for name, pairs in (("true", true), ("exchanged", make_pairs(tmp_path / "exchanged", exchanged))):
        done = train(tmp_path / name, pairs, base, steps=40, learning_rate=5e-3)
        model = load_encoder(done.folder / "model", "cpu")
        ranks = rank(embed(model, held.questions, 64), embed(model, held.corpus, 64), held.relevant)
        found[name] = score(ranks)["ndcg_at_10"].mean()
    assert found["true"] > found["exchanged"] + 0.1


class TestGoingOn:
    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> dict[str, Any]:
        return {"checkpoint_every": 3, "validate_every": 4, "warmup_fraction": 0.25}

    def test_stopped_and_resumed_is_undisturbed(
        self, pairs: Manifest, base: Manifest, tmp_path: Path, config: dict[str, Any]
    ) -> None:
        """With dropout, over the end of an epoch (5 batches), stopped between two checkpoints."""
        whole = train(tmp_path / "whole", pairs, base, **config)
        with pytest.raises(StopRequestedError, match="after step 5 of 8"):
            train(tmp_path / "stopped", pairs, base, stop_after=5, **config)
        resumed = train(tmp_path / "stopped", pairs, base, **config)
        assert resumed.history == whole.history
        assert resumed.result.metadata == whole.result.metadata

    def test_a_checkpoint_that_is_not_whole_is_passed_over(
        self, pairs: Manifest, base: Manifest, tmp_path: Path, config: dict[str, Any]
    ) -> None:
        whole = train(tmp_path / "whole", pairs, base, **config)
        with pytest.raises(StopRequestedError):
            train(tmp_path / "torn", pairs, base, stop_after=5, **config)
        torn = tmp_path / "torn" / "checkpoints" / "checkpoint-5"
        (torn / "whole").unlink()
        (torn / "optimizer.pt").write_bytes(b"torn")
        resumed = train(tmp_path / "torn", pairs, base, **config)
        assert resumed.history == whole.history
        assert resumed.result.metadata == whole.result.metadata

    def test_another_seed_is_another_run(self, pairs: Manifest, base: Manifest, tmp_path: Path) -> None:
        first, second = (train(tmp_path / str(seed), pairs, base, seed=seed, steps=2) for seed in (0, 1))
        assert first.losses != second.losses


class TestMistakes:
    def test_a_loss_that_is_nan_ends_the_run(self, pairs: Manifest, still: Manifest, tmp_path: Path) -> None:
        broken = tmp_path / "broken"
        shutil.copytree(still.uri, broken)
        model = load_encoder(broken / "model", "cpu")
        model[0].model.embeddings.word_embeddings.weight.data[:] = float("nan")
        model.save_pretrained(str(broken / "model"), create_model_card=False)
        base = still.model_copy(update={"uri": str(broken)})
        with pytest.raises(UserError, match=r"training\.learning_rate: 0\.001 made the loss of step 1 nan"):
            train(tmp_path / "run", pairs, base)

    def test_more_tokens_than_positions(self, pairs: Manifest, still: Manifest, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"training\.max_sequence_length: 64 is more than the 32 positions"):
            train(tmp_path / "run", pairs, still, max_sequence_length=64)
