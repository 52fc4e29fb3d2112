"""Step `fetch_model`: a model from outside, as the artifact that every later step of the pipeline starts from.

An alias may move and a folder may change while a pipeline runs. Taken once, all steps see the same weights, and the
digest in the manifest says which they were.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

from modelmill.components.core import events, tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.step import StepResult
from modelmill.components.core.weights import weights_digest
from modelmill.components.data.record_ids import RECORDS_FILE
from modelmill.components.registry.config import FetchModelConfig
from modelmill.components.registry.model_source import MODEL_FILES, FoundModel, NoSuchVersion, find_model

logger = logging.getLogger("modelmill")
_MODULES = "modules.json"  # sentence-transformers lists the parts of an embedding model there


def fetch_model(config: FetchModelConfig, output: Path) -> StepResult:
    """Bring a model to where the pipeline's steps can read it.

    Writes `model/`, a Hugging Face folder: configuration, safetensors, tokenizer; and `training_records.txt` for a
    version of the registry that has one. Files on the same file system are
    linked and cost no space; others are copied.

    Args:
        config: which model.
        output: an empty folder.

    Returns:
        kind `model`; metadata `weights_digest`, `reference` (what was asked for), `version` (of the registry or the
        Hub, else empty), `flavor` (`language-model`, `embedding` or `forecaster`).

    Raises:
        UserError: the model cannot be had, holds no safetensors, or is quantised.
    """
    reference, found = _find(config, output.parent)
    model = output / "model"
    events.progress(f"taking {reference}")
    for path in _files(found.folder):
        _take(path, model / path.relative_to(found.folder))
    if found.records is not None:
        shutil.copyfile(found.records, output / RECORDS_FILE)
    settings = _settings(model, reference)
    flavor = _flavor(model, settings)
    digest = weights_digest(model)
    size = sum(path.stat().st_size for path in model.rglob("*") if path.is_file())
    logger.info("%s%s: %.1f MB, weights %s", reference, found.version and f" {found.version}", size / 1e6, digest[:16])
    tracking.set_tags({"modelmill.base": reference, "modelmill.base_version": found.version})
    counts, vocabulary = {"bytes": size}, settings.get("vocab_size")
    if isinstance(vocabulary, int):
        counts["vocab_size"] = vocabulary
    metadata = {"weights_digest": digest, "reference": reference, "version": found.version, "flavor": flavor}
    return StepResult("model", counts=counts, metadata=metadata)


def _find(config: FetchModelConfig, scratch: Path) -> tuple[str, FoundModel]:
    try:
        return config.reference, find_model(config.reference, scratch, "model.reference")
    except NoSuchVersion as missing:
        if config.otherwise is None:
            raise config.explained(missing) from None
        logger.info("%s; taking %s", missing, config.otherwise)
    try:
        return config.otherwise, find_model(config.otherwise, scratch, "model.otherwise")
    except NoSuchVersion as missing:
        raise config.explained(missing) from None


def _files(folder: Path) -> list[Path]:
    return sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()})


def _take(source: Path, target: Path) -> None:
    """Link a file, or copy it where that cannot be; links of a cache are followed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve()
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _flavor(model: Path, settings: dict[str, object]) -> str:
    if "chronos_config" in settings:
        return "forecaster"
    return "embedding" if (model / _MODULES).is_file() else "language-model"


def _settings(model: Path, reference: str) -> dict[str, object]:
    try:
        settings = json.loads((model / "config.json").read_bytes())
    except ValueError as error:
        raise UserError(f"model.reference: config.json of {reference} is no JSON ({error}); copy it again") from None
    if not isinstance(settings, dict):
        raise UserError(f"model.reference: config.json of {reference} is no JSON object; copy it again")
    if settings.get("quantization_config"):
        raise UserError(f"model.reference: {reference} holds quantised weights; use the model they were made from")
    return settings
