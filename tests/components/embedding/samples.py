"""A tiny encoder and pairs of its words, as the steps before leave them."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

from modelmill.components.core.manifest import Manifest
from modelmill.components.core.weights import weights_digest
from modelmill.components.embedding.config import PairsConfig
from modelmill.components.embedding.pairs import prepare_pairs
from tests.components.evaluation.encoders import bert

NOUNS = ("cat", "dog", "mat", "house", "tree", "fox", "big", "red", "blue", "quick", "slow", "brown")


def records(count: int = 132) -> list[dict[str, Any]]:
    """Each pair of texts has two words in common, in the other order."""
    return [{"sentence1": f"{a} {b}", "sentence2": f"the {b} sat on a {a}"} for a, b in permutations(NOUNS, 2)][:count]


def write_lines(path: Path, items: list[Any]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def make_pairs(folder: Path, items: list[dict[str, Any]] | None = None, **changes: Any) -> Manifest:
    """What `prepare_pairs` makes of records."""
    folder.mkdir(parents=True, exist_ok=True)
    source = {"type": "files", "paths": [str(write_lines(folder / "pairs.jsonl", items or records()))]}
    source["fields"] = changes.pop("fields", {})
    config = PairsConfig(source=[source], **{"test_fraction": 0.2, "validation_fraction": 0.2, **changes})
    output = folder / "data"
    output.mkdir()
    result = prepare_pairs(config, output)
    return Manifest.describe(output, kind=result.kind, counts=result.counts, metadata=result.metadata)


def make_base(folder: Path, *, dropout: float = 0.1) -> Manifest:
    """A BERT of two layers without `modules.json`, as transformers saves one."""
    model = bert(folder / "model", layers=2, positions=32)
    settings = json.loads((model / "config.json").read_text())
    settings |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    (model / "config.json").write_text(json.dumps(settings))
    return Manifest.describe(folder, kind="model", metadata={"weights_digest": weights_digest(model)})
