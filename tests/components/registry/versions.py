"""Small models, gates about them, and versions of them in a registry, without a training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mlflow import MlflowClient
from safetensors.numpy import save_file

from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepResult
from modelmill.components.core.weights import weights_digest
from modelmill.components.evaluation.config import GateConfig
from modelmill.components.evaluation.gate import gate
from modelmill.components.evaluation.records import write_scores
from modelmill.components.registry.config import PromoteConfig
from modelmill.components.registry.promote import promote
from modelmill.components.registry.store import FILES_TAG, WEIGHTS_TAG, files_digest

EXAMPLES = 20


class Workshop:
    """Makes what a promotion needs below one folder; everything is told apart by a number."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made = 0

    def fresh(self, name: str) -> Path:
        self._made += 1
        path = self.folder / f"{name}-{self._made}" / "data"
        path.mkdir(parents=True)
        return path

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(Home.current().tracking_uri)

    def model(self, seed: int, **metadata: Any) -> Manifest:
        """A model whose weights are its number."""
        folder = self.fresh("model")
        (folder / "model" / "parts").mkdir(parents=True)
        save_file({"weight": np.full((4, 4), seed, np.float32)}, folder / "model" / "model.safetensors")
        (folder / "model" / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 4}))
        (folder / "model" / "parts" / "config.json").write_text("{}")
        facts = {WEIGHTS_TAG: weights_digest(folder / "model"), **metadata}
        return Manifest.describe(folder, kind="model", counts={"parameters": 16}, metadata=facts, code="c0de")

    def scores(self, model: Manifest, level: float) -> Manifest:
        folder = self.fresh("scores")
        values = level + np.random.default_rng(0).normal(0, 0.01, EXAMPLES)
        write_scores(folder / "scores.jsonl", [str(number) for number in range(EXAMPLES)], {"rougeL": values})
        return Manifest.describe(folder, kind="scores", metadata={WEIGHTS_TAG: model.metadata[WEIGHTS_TAG]})

    def gate(self, candidate: Manifest, reference: Manifest, *, better: bool = True, seed: int = 0) -> Manifest:
        """The verdict of the real gate: the candidate's scores are higher, or lower."""
        folder = self.fresh("gate")
        sides = {
            "candidate": self.scores(candidate, 0.6 if better else 0.4),
            "reference": self.scores(reference, 0.5),
        }
        result = gate(GateConfig(metric="rougeL", resamples=200, seed=seed), folder, **sides)
        return described(folder, result)

    def register(self, name: str, model: Manifest, **tags: str) -> Manifest:
        """A version as `register_model` leaves it, made in a few milliseconds."""
        client = self.client
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        place = self.fresh("registered")
        target = place / "data" / "model"
        for entry in model.files:
            copy = target / entry.path.removeprefix("model/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(model.path(entry.path).read_bytes())
        written = {WEIGHTS_TAG: model.metadata[WEIGHTS_TAG], FILES_TAG: files_digest(model), **tags}
        made = client.create_model_version(name, place.as_uri(), tags=written)
        client.set_registered_model_alias(name, "candidate", str(made.version))
        facts = {"name": name, "version": str(made.version), "alias": "candidate"}
        metadata = {**facts, WEIGHTS_TAG: model.metadata[WEIGHTS_TAG]}
        return Manifest.describe(self.fresh("registration"), kind="registration", metadata=metadata)

    def promote(self, registration: Manifest, verdict: Manifest, **config: Any) -> Manifest:
        folder = self.fresh("promotion")
        result = promote(PromoteConfig(**config), folder, registration=registration, gate=verdict)
        return described(folder, result)

    def outcome(self, registration: Manifest, verdict: Manifest) -> str:
        return str(self.promote(registration, verdict).metadata["outcome"])

    def aliases(self, name: str) -> dict[str, str]:
        """Aliases but the candidate's."""
        found = self.client.get_registered_model(name).aliases
        return {alias: str(version) for alias, version in sorted(found.items()) if alias != "candidate"}

    def tags(self, name: str, version: str) -> Mapping[str, str]:
        return dict(self.client.get_model_version(name, version).tags)

    def reign(self, name: str, number: int = 2) -> list[tuple[Manifest, Manifest, Manifest]]:
        """Promote models 1, 2, ... one over the other; their models, registrations and gates."""
        history: list[tuple[Manifest, Manifest, Manifest]] = []
        for seed in range(1, number + 1):
            model = self.model(seed)
            verdict = self.gate(model, history[-1][0] if history else self.model(0))
            registration = self.register(name, model)
            assert self.outcome(registration, verdict) == "promoted"
            history.append((model, registration, verdict))
        return history


def described(folder: Path, result: StepResult) -> Manifest:
    fields = {"counts": result.counts, "metrics": result.metrics, "metadata": result.metadata}
    return Manifest.describe(folder, kind=result.kind, **fields)
