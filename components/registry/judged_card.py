"""The model card of a model that a gate judged: where it comes from, what was decided, and what that leaves open."""

from __future__ import annotations

from modelmill.components.core.manifest import Manifest
from modelmill.components.registry.config import RegisterConfig
from modelmill.components.registry.flavors import Flavor
from modelmill.components.registry.model_card import intended_use, loading
from modelmill.components.registry.verdict import Verdict

_SPLITS = ("train", "validation", "test")


def judged_description(config: RegisterConfig, model: Manifest, verdict: Verdict) -> str:
    """Two or three sentences for the version in MLflow's list."""
    intro = f"{config.description.rstrip('.')}. " if config.description else ""
    made = f"{_method(model)}, recipe {config.recipe_name or 'unnamed'}. "
    return f"{intro}{made}{standing(verdict)} The whole model card is the file model_card.md of the source run."


def judged_card(
    config: RegisterConfig,
    model: Manifest,
    verdict: Verdict,
    flavor: Flavor,
    instructions: Manifest | None,
    code_version: str,
) -> str:
    """The card as Markdown, every sentence from the manifests and the gate.

    Args:
        config: name, description and recipe.
        model: manifest of the model.
        verdict: what the gate decided about it.
        flavor: how it is served.
        instructions: manifest of the data it learnt from, if known.
        code_version: version of modelmill that registers.
    """
    sections = {
        "Intended use": intended_use(config),
        "Base and method": _training(config, model, code_version),
        "Data": _data(model, instructions),
        "Evaluation": f"The gate **{verdict.word}**.\n\n{verdict.report}",
        "Limitations": "\n".join(f"- {line}" for line in limitations(verdict)),
        "Loading it": loading(config, flavor),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return f"# {config.name}\n\n{standing(verdict)}\n\n{body}\n"


def standing(verdict: Verdict) -> str:
    """The decision in one sentence."""
    return f"The gate {verdict.word}: {'; '.join(verdict.reasons) or verdict.metric}."


def limitations(verdict: Verdict) -> list[str]:
    """What the decision leaves open, worst first."""
    lines = []
    if not verdict.passed:
        lines.append("It was not shown to be better than what it was compared with: it should not replace that.")
    if not verdict.reference:
        lines.append("What it was compared with is not known by its weights.")
    lines.append(
        f"The gate looked at {verdict.metric} on the examples given to it only: not at other tasks, and not for "
        "harmful or biased output. What its base does badly it may still do badly."
    )
    return lines


def _method(model: Manifest) -> str:
    return {"full": "Fine-tuned in all weights", "": "Trained"}.get(
        str(model.metadata.get("method", "")), f"Fine-tuned by {model.metadata.get('method')}"
    )


def public_base(model: Manifest) -> str:
    """How the base is called where that is a name for others, and not a folder of one machine."""
    base = str(model.metadata.get("base", ""))
    return base if base.startswith(("models:/", "hf:", "package:", "sha256:")) else ""


def _training(config: RegisterConfig, model: Manifest, code_version: str) -> str:
    facts = model.metadata
    lines = [
        f"Method: {facts.get('method') or 'not stated'}",
        f"Base: {public_base(model) or 'not named'}, weights `{facts.get('base_digest') or 'unknown'}`",
        f"Weights: `{facts['weights_digest']}`",
        f"Recipe: {config.recipe_name or 'unnamed'} (hash `{config.recipe_hash or 'unknown'}`)",
        f"Code: modelmill {code_version}, digest `{model.code or 'unknown'}`",
    ]
    if facts.get("adapter_digest"):
        lines.insert(2, f"Adapter, merged into the base: `{facts['adapter_digest']}`")
    named = {"parameters": "Parameters", "steps": "Optimizer steps", "tokens": "Targets learnt from"}
    lines += [f"{label}: {model.counts[name]:,}" for name, label in named.items() if name in model.counts]
    return "\n".join(f"- {line}" for line in lines)


def _data(model: Manifest, instructions: Manifest | None) -> str:
    digest = f"Data `{model.metadata.get('dataset_digest') or 'unknown'}`."
    if instructions is None:
        return digest
    counts = instructions.counts
    rows = [
        f"| {split} | {counts[f'{split}_conversations']:,} | {counts.get(f'{split}_targets', 0):,} |"
        for split in _SPLITS
        if f"{split}_conversations" in counts
    ]
    table = ["| split | conversations | targets |", "| --- | ---: | ---: |", *rows, ""] if rows else []
    return "\n".join([*table, digest])
