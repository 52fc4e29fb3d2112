"""Step `continue_pretraining`: the training of a Llama goes on from finished weights, on other text. Torch-free."""

from __future__ import annotations

import json
from pathlib import Path

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.model_folder import proven_folder
from modelmill.components.core.step import StepResult, step_options
from modelmill.components.data.record_ids import RECORDS_FILE, known_records, record_ids
from modelmill.components.llama.config import ContinueConfig, LlamaConfig
from modelmill.components.llama.pretrain import launch_training
from modelmill.components.training.config import check_run
from modelmill.components.training.launch import Launcher


@step_options(resumable=True, launches=True)
def continue_pretraining(
    config: ContinueConfig,
    output: Path,
    *,
    base: Manifest,
    corpus: Manifest,
    tokens: Manifest,
    launcher: Launcher | None = None,
) -> StepResult:
    """Train an exported Llama further on packed tokens; the optimizer and the schedule begin anew.

    Writes what `pretrain` does, with the base's own tokenizer, and `training_records.txt`: ids of the corpus' training
    documents and of those the base tells of.

    Args:
        config: the training.
        output: the artifact's folder.
        base: manifest of the model to start from; its `config.json` is the architecture.
        corpus: manifest of `ingest_corpus`.
        tokens: its rows, packed with the base's tokenizer.
        launcher: where the training processes run; default this machine.

    Raises:
        UserError: the base is no Llama that this decoder implements or was altered, or as `pretrain`.
    """
    folder, digest = proven_folder(base, "base")
    architecture = LlamaConfig.from_huggingface(_settings(folder))
    check_run(architecture, config.training, tokens)
    result = launch_training(
        architecture, config.training, output, tokenizer=folder, tokens=tokens, launcher=launcher, base=folder
    )
    records = known_records(base) | set(record_ids(corpus))
    (output / RECORDS_FILE).write_text("".join(f"{identity}\n" for identity in sorted(records)), encoding="utf-8")
    metadata = {
        **result.metadata,
        "method": "pretraining",
        "base": str(base.metadata.get("reference", "")),
        "base_digest": digest,
        "dataset_digest": tokens.digest,
    }
    return StepResult(kind="model", counts=result.counts, metrics=result.metrics, metadata=metadata)


def _settings(folder: Path) -> dict[str, object]:
    try:
        settings = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"base: {folder} has no readable config.json ({error}); copy it again") from None
    if not isinstance(settings, dict) or settings.get("model_type") != "llama":
        kind = settings.get("model_type") if isinstance(settings, dict) else None
        raise UserError(
            f"base: model_type is {kind!r} and pretraining goes on for llama only; use the retrain pipeline"
        )
    return settings
