"""Step `merge_adapter`: base and adapter as one plain model, with proof that it is the same."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelmill.components.core import events, tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepResult, step_options
from modelmill.components.core.weights import weights_digest
from modelmill.components.data.instruction_rows import InstructionBatch, open_instructions
from modelmill.components.finetuning.base import Base, open_base
from modelmill.components.finetuning.config import MergeConfig
from modelmill.components.finetuning.folders import ADAPTER_FOLDER, MODEL_FOLDER, copy_tokenizer, take_file
from modelmill.components.finetuning.job import refuse_missing_packages
from modelmill.components.training.journal import HISTORY

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

logger = logging.getLogger("modelmill")


@step_options(device=True)
def merge_adapter(
    config: MergeConfig, output: Path, *, adapter: Manifest, data: Manifest, base: Manifest
) -> StepResult:
    """Add an adapter to the weights of its base and check the logits on held-out rows.

    Writes `model/` (a Hugging Face folder in the base's precision, with its tokenizer), `history.jsonl` of the
    adapter's training and `merge.json`. The check computes in fp32 (fp64 for a base in fp64), so it is of the merge;
    what storing the weights in the base's precision changes is reported beside it, and must pass as well where that
    precision is the one of the check.

    An adapter of method qlora was trained on weights rounded to 4 bits. It is added to those, written out again,
    unless `merge.into` asks for the base's own; that model differs from the trained one by the rounding.

    A model, which method full makes, needs no merging and is passed on with its history, so that one pipeline serves
    every method.

    Args:
        config: rows and tolerance.
        output: an empty folder.
        adapter: manifest of `finetune` or `dpo`.
        data: manifest of `prepare_instructions` or `prepare_preferences`; rows of its validation split, or the test
            split where that is empty.
        base: manifest of the model the adapter was trained on.

    Returns:
        kind `model`; metrics of the training and, where something was merged, `logits_difference` (merged against base
        and adapter) and `stored_difference` (as read back), both relative to the largest logit where that is over 1;
        metadata as of `finetune`.

    Raises:
        UserError: the adapter belongs to another base, there are no held-out rows, or the logits differ.
    """
    if adapter.kind == "model":
        return _pass_on(adapter, output)
    found = open_base(base)
    _check_pair(adapter, found)
    rounding = adapter.metadata.get("quantization") if config.into == "trained" else None
    refuse_missing_packages("qlora" if rounding else "lora")
    batch = _held_out(data, config.rows)
    trained = adapter.folder() / ADAPTER_FOLDER
    events.progress("merging")
    differences, largest = _merge(found, trained, output / MODEL_FOLDER, batch, config, rounding)
    copy_tokenizer(found.folder, output / MODEL_FOLDER)
    shutil.copyfile(adapter.path(HISTORY), output / HISTORY)
    record = {
        "base": found.name,
        "base_digest": found.digest,
        "adapter_digest": adapter.metadata.get("weights_digest"),
        "quantization": rounding,
        "rows": len(batch.tokens),
        "largest_logit": largest,
        **differences,
    }
    (output / "merge.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    logger.info("merged; logits differ by %.2e, as stored by %.2e", *differences.values())
    tracking.log_metrics(differences)
    metadata = {
        **adapter.metadata,
        "adapter_digest": adapter.metadata.get("weights_digest"),
        "weights_digest": weights_digest(output / MODEL_FOLDER),
    }
    kept = {"parameters", "steps", "tokens"}
    counts: dict[str, int] = {name: adapter.counts[name] for name in sorted(adapter.counts.keys() & kept)}
    return StepResult(kind="model", counts=counts, metrics={**adapter.metrics, **differences}, metadata=metadata)


def _pass_on(model: Manifest, output: Path) -> StepResult:
    for entry in model.files:
        take_file(model.path(entry.path), output / entry.path)
    return StepResult("model", counts=model.counts, metrics=model.metrics, metadata=model.metadata)


def _check_pair(adapter: Manifest, base: Base) -> None:
    if adapter.kind != "adapter":
        raise UserError(f"adapter: {adapter.uri} is of kind {adapter.kind}; give what finetune or dpo makes")
    trained_on = str(adapter.metadata.get("base_digest", ""))
    if trained_on != base.digest:
        raise UserError(
            f"base: {base.name} has the weights digest {base.digest[:16]}, and the adapter was trained on"
            f" {adapter.metadata.get('base')} with {trained_on[:16]}; use that base"
        )


def _held_out(data: Manifest, number: int) -> InstructionBatch:
    for split in ("validation", "test"):
        rows = open_instructions(data, split)
        if len(rows):
            return rows.take(slice(0, number))
    raise UserError("data: no held-out row to compare logits on; raise its validation_fraction")


def _merge(
    base: Base,
    adapter: Path,
    folder: Path,
    batch: InstructionBatch,
    config: MergeConfig,
    rounding: dict[str, Any] | None,
) -> tuple[dict[str, float], float]:
    """Write the merged model; returns how far its logits are off, and the largest of them."""
    import torch

    from modelmill.components.finetuning.adapters import load_adapter, merge
    from modelmill.components.training.pretrained import load_causal_lm, stored_dtype

    if rounding is None:
        model = load_causal_lm(base.folder, dtype=torch.float32, parameter="base")
    else:
        from modelmill.components.finetuning.quantization import load_as_rounded

        model = load_as_rounded(base.folder, rounding)
    precision, stored = next(model.parameters()).dtype, stored_dtype(base.folder)
    load_adapter(model, adapter)
    expected = _logits(model, batch)
    largest = max(1.0, float(expected.abs().max()))
    merge(model)
    differences = {"logits_difference": _difference(_logits(model, batch), expected, largest)}
    _refuse(differences["logits_difference"], config, "merged")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(stored)
    model.save_pretrained(str(folder))
    del model
    again = load_causal_lm(folder, dtype=torch.float32, parameter="merge")
    differences["stored_difference"] = _difference(_logits(again, batch), expected, largest)
    if stored == precision:
        _refuse(differences["stored_difference"], config, "stored")
    return differences, float(expected.abs().max())


def _logits(model: PreTrainedModel, batch: InstructionBatch) -> Tensor:
    """Logits [rows, T, V] of held-out rows, one row at a time."""
    import torch

    from modelmill.components.finetuning.causal_lm import stack_rows

    model.eval()
    rows = torch.from_numpy(stack_rows(batch))
    with torch.no_grad():
        return torch.cat(
            [model(input_ids=row[:, 0], position_ids=row[:, 2], use_cache=False).logits for row in rows.split(1)]
        )


def _difference(found: Tensor, expected: Tensor, largest: float) -> float:
    return float((found - expected).abs().max()) / largest


def _refuse(difference: float, config: MergeConfig, what: str) -> None:
    # A comparison with nan is false, so it is asked for what must be.
    if not difference <= config.tolerance:
        raise UserError(
            f"merging.tolerance: the {what} model's logits differ by {difference:.2e} from those of base and adapter,"
            f" {config.tolerance:g} is allowed; the weights are too large to merge exactly, so serve the adapter"
        )
