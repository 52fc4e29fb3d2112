"""The model card: what the numbers allow to be said about a model, and what they do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelmill.components.registry.config import RegisterConfig
from modelmill.components.registry.flavors import DEFAULT, FLAVORS, Flavor

# Hoffmann et al. 2022 (arXiv:2203.15556): about 20 training tokens a parameter are compute-optimal.
_COMPUTE_OPTIMAL = 20


def short_description(config: RegisterConfig, evaluation: Mapping[str, Any]) -> str:
    """Two sentences for the version in MLflow's list."""
    facts, scores = evaluation["provenance"], evaluation["scores"]
    intro = f"{config.description.rstrip('.')}. " if config.description else ""
    return (
        f"{intro}{facts['parameters']:,} parameters, {facts['tokens_trained_on'] or 0:,} training tokens, "
        f"recipe {config.recipe_name or 'unnamed'}. {_standing(scores)} "
        "The whole model card is the file model_card.md of the source run."
    )


def model_card(
    config: RegisterConfig, evaluation: Mapping[str, Any], code_version: str, flavor: Flavor = FLAVORS[DEFAULT]
) -> str:
    """The card as Markdown, every sentence from the content of `evaluation.json` and the registration.

    Args:
        config: name, description and recipe.
        evaluation: the content of `evaluation.json`.
        code_version: version of modelmill that registers.
        flavor: how the model is served.
    """
    facts = evaluation["provenance"]
    sections = {
        "Intended use": intended_use(config),
        "Data": _data(facts),
        "Training": _training(config, facts, code_version),
        "Evaluation": _evaluation(evaluation),
        "Limitations": "\n".join(f"- {line}" for line in limitations(evaluation)),
        "Loading it": loading(config, flavor),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return f"# {config.name}\n\n{_standing(evaluation['scores'])}\n\n{body}\n"


def limitations(evaluation: Mapping[str, Any]) -> list[str]:
    """What the facts say against the model, worst first."""
    facts, scored = evaluation["provenance"], evaluation["scored"]
    lines = []
    for name, compared in evaluation["comparison"].items():
        if compared["difference"] > 2 * compared["standard_error"]:
            lines.append(
                f"It predicts held-out text worse than the {name} baseline, by "
                f"{compared['difference']:.3f} nats per token: it should not be used for anything but tests."
            )
        elif compared["difference"] >= -2 * compared["standard_error"]:
            lines.append(f"On held-out text it cannot be told from the {name} baseline (within two standard errors).")
    trained, parameters = facts["tokens_trained_on"], facts["parameters"]
    if trained and parameters and trained < _COMPUTE_OPTIMAL * parameters:
        lines.append(
            f"It was trained on {trained / parameters:.2g} tokens per parameter; about {_COMPUTE_OPTIMAL} are "
            "compute-optimal (Hoffmann et al. 2022), so more data would still help."
        )
    if trained and trained > facts["training_split_tokens"]:
        epochs = trained / facts["training_split_tokens"]
        lines.append(f"It saw its training text {epochs:.1f} times and may repeat parts of it word for word.")
    if parameters and parameters < 1e8:
        lines.append(
            f"With {parameters:,} parameters it is too small to hold facts: what it writes is no information."
        )
    lines.append(f"It sees at most {facts['sequence_length']:,} tokens at a time.")
    lines.append(
        f"It was evaluated on {scored['tokens']:,} tokens held out from its own corpus only: not on other text, not "
        "on tasks, and not for harmful or biased output."
    )
    lines.append("It continues text. It was not trained to follow instructions or to refuse any.")
    return lines


def _standing(scores: Mapping[str, Any]) -> str:
    model, bigram, unigram = (scores[name]["bits_per_byte"] for name in ("model", "bigram", "unigram"))
    return f"{model:.3f} bits per byte on held-out text (bigram {bigram:.3f}, unigram {unigram:.3f})."


def intended_use(config: RegisterConfig) -> str:
    """What the recipe says the model is for, and what its alias means."""
    use = config.description or "No use was stated in the recipe."
    return f"{use.rstrip('.')}. The alias `{config.alias}` marks a version to be reviewed, not one to be deployed."


def _data(facts: Mapping[str, Any]) -> str:
    return "\n".join(
        [
            "| split | tokens | bytes of text |",
            "| --- | ---: | ---: |",
            f"| training | {facts['training_split_tokens']:,} | {facts['training_split_bytes']:,} |",
            f"| test | {facts['test_split_tokens']:,} | {facts['test_split_bytes']:,} |",
            "",
            f"Token rows `{facts['dataset_digest']}`, vocabulary of {facts['vocabulary']:,}"
            + (f" (tokenizer `{facts['tokenizer_digest']}`)." if facts["tokenizer_digest"] else "."),
            "Splits are made by document, so that no document is in two of them.",
        ]
    )


def _training(config: RegisterConfig, facts: Mapping[str, Any], code_version: str) -> str:
    lines = [
        f"Recipe: {config.recipe_name or 'unnamed'} (hash `{config.recipe_hash or 'unknown'}`)",
        f"Code: modelmill {code_version}, digest `{facts['code'] or 'unknown'}`",
        f"Parameters: {facts['parameters']:,}",
        f"Weights: `{facts['weights_digest']}`",
    ]
    if facts["optimizer_steps"]:
        lines.append(f"Optimizer steps: {facts['optimizer_steps']:,}, tokens: {facts['tokens_trained_on'] or 0:,}")
    if facts["processes"]:
        lines.append(f"Processes: {facts['processes']}")
    return "\n".join(f"- {line}" for line in lines)


def _evaluation(evaluation: Mapping[str, Any]) -> str:
    lines = [
        "| predictor | loss (nats per token) | perplexity | bits per byte | this model is |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    names = {"model": "this model", "bigram": "Kneser-Ney bigram", "unigram": "unigram", "uniform": "uniform guess"}
    for name, score in evaluation["scores"].items():
        error = f" ± {score['standard_error']:.3f}" if "standard_error" in score else ""
        lines.append(
            f"| {names.get(name, name)} | {score['loss']:.3f}{error} | {score['perplexity']:,.2f} | "
            f"{score['bits_per_byte']:.3f} | {_compared(evaluation['comparison'].get(name))} |"
        )
    scored = evaluation["scored"]
    lines += [
        "",
        f"{scored['rows']:,} of {scored['split_rows']:,} test rows, {scored['tokens']:,} tokens; ± is one standard "
        f"error over rows. {scored['basis']}",
    ]
    return "\n".join(lines)


def _compared(difference: Mapping[str, float] | None) -> str:
    if difference is None:
        return ""
    if abs(difference["difference"]) <= 2 * difference["standard_error"]:
        return "not clearly different"
    return "**worse**" if difference["difference"] > 0 else "better"


def loading(config: RegisterConfig, flavor: Flavor) -> str:
    """Python that loads and asks the model."""
    lines = [
        "import mlflow",
        "",
        f'model = mlflow.pyfunc.load_model("models:/{config.name}@{config.alias}")',
        *flavor.usage,
    ]
    return "\n".join(["```python", *lines, "```"])
