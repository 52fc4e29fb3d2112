"""The page a reviewer opens: one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelmill.components.evaluation.page import page, text

_NAMES = {"model": "this model", "bigram": "Kneser-Ney bigram", "unigram": "unigram", "uniform": "uniform guess"}


def verdict(evaluation: Mapping[str, Any]) -> tuple[str, str]:
    """One sentence that says how the model stands against the baselines, in bits per byte.

    Args:
        evaluation: the content of `evaluation.json`.

    Returns:
        `better`, `worse` or `unclear` (within two standard errors of the bigram), and the sentence.
    """
    scores, compared = evaluation["scores"], evaluation["comparison"]["bigram"]
    model, bigram, unigram = (scores[name]["bits_per_byte"] for name in ("model", "bigram", "unigram"))
    sentence = f"The model needs {model:.3f} bits per byte of held-out text: {_against(model, bigram)} the bigram "
    sentence += f"({bigram:.3f}) and {_against(model, unigram)} the unigram ({unigram:.3f})."
    if abs(compared["difference"]) <= 2 * compared["standard_error"]:
        return (
            "unclear",
            sentence + " The difference to the bigram is within two standard errors: no clear difference.",
        )
    if compared["difference"] > 0:
        return "worse", sentence + " Counting pairs of tokens predicts this text better than the model does."
    return "better", sentence


def _against(value: float, other: float) -> str:
    if not other:
        return "against"
    change = value / other - 1
    return f"{abs(change):.1%} {'more' if change > 0 else 'less'} than"


def render_report(
    evaluation: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], figures: Mapping[str, str]
) -> str:
    """The whole page.

    Args:
        evaluation: the content of `evaluation.json`.
        samples: the content of `samples.json`.
        figures: `<svg>` elements of `figures.curves`, empty when the model has no history.
    """
    level, sentence = verdict(evaluation)
    parts = [
        f"<p class=note>Weights <code>{text(evaluation['provenance']['weights_digest'])[:16]}</code>, "
        f"{evaluation['scored']['tokens']:,} tokens of text the model was not trained on.</p>",
        f'<div class="verdict {level}">{text(sentence)}</div>',
        _cards(evaluation),
        "<h2>Training</h2>",
        _curves(evaluation, figures),
        "<h2>Against the baselines</h2>",
        _scores(evaluation),
        "<h2>Samples</h2>",
        _samples(samples),
        "<h2>Where it comes from</h2>",
        _facts(evaluation),
    ]
    return page("Held-out evaluation", parts)


def _cards(evaluation: Mapping[str, Any]) -> str:
    score = evaluation["scores"]["model"]
    cards = [
        (f"{score['bits_per_byte']:.3f}", "bits per byte"),
        (f"{score['loss']:.3f} ± {score['standard_error']:.3f}", "loss, nats per token"),
        (f"{score['perplexity']:,.2f}", "perplexity per token"),
        (f"{evaluation['provenance']['parameters']:,}", "parameters"),
    ]
    return (
        f"<div class=numbers>{''.join(f'<div><b>{big}</b><span>{small}</span></div>' for big, small in cards)}</div>"
    )


def _curves(evaluation: Mapping[str, Any], figures: Mapping[str, str]) -> str:
    if not figures:
        return "<p class=note>The model came without a training history.</p>"
    held_out = bool(evaluation["validation"])
    shown = "dashed: the baselines on the validation split" if held_out else "no validation split to put baselines on"
    shapes = (
        f"<figure>{figures['loss']}<figcaption>Loss by optimizer step; {shown}.</figcaption></figure>"
        f"<figure>{figures['learning_rate']}<figcaption>Learning rate.</figcaption></figure>"
    )
    if "grad_norm" in figures:
        shapes += (
            f"<figure>{figures['grad_norm']}<figcaption>Norm of the gradient before clipping.</figcaption></figure>"
        )
    return shapes


def _scores(evaluation: Mapping[str, Any]) -> str:
    rows = []
    for name, score in evaluation["scores"].items():
        compared = evaluation["comparison"].get(name)
        gap, kind = "", ""
        if compared is not None:
            gap = f"{compared['difference']:+.3f} ± {compared['standard_error']:.3f}"
            if abs(compared["difference"]) > 2 * compared["standard_error"]:
                kind = "worse" if compared["difference"] > 0 else "better"
        error = f" ± {score['standard_error']:.3f}" if "standard_error" in score else ""
        cells = [f"{score['loss']:.3f}{error}", f"{score['perplexity']:,.2f}", f"{score['bits_per_byte']:.3f}"]
        numbers = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f"<tr><td>{text(_NAMES.get(name, name))}</td>{numbers}<td class='{kind}'>{gap}</td></tr>")
    head = "<th>predictor</th><th>loss (nats/token)</th><th>perplexity</th><th>bits/byte</th><th>model minus it</th>"
    scored = evaluation["scored"]
    counted = evaluation["baselines"]
    notes = [
        f"Scored: {scored['rows']:,} of {scored['split_rows']:,} test rows, {scored['tokens']:,} tokens. "
        f"{scored['basis']}",
        "± is one standard error over rows; differences are paired row by row.",
        f"The baselines are counted on {counted['tokens']:,} of the {counted['training_tokens']:,} training tokens: "
        f"unigram with add-one smoothing; interpolated Kneser-Ney bigram over {counted['pairs']:,} distinct pairs, "
        f"discounts {counted['discount']:.3f} and {counted['lower_discount']:.3f}.",
    ]
    table = f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    return table + "".join(f"<p class=note>{text(note)}</p>" for note in notes)


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    if not samples:
        return "<p class=note>No samples were asked for.</p>"
    parts = ["<p class=note>What the model was given, then, marked, what it wrote.</p>"]
    for sample in samples:
        prompt = text(sample["prompt"])
        lines = []
        for continuation in sample["continuations"]:
            lines.append(f"<h3>{text(_method(continuation))}</h3>")
            lines.append(f"<div class=text>{prompt}<mark>{text(continuation['text'])}</mark></div>")
        if sample["reference"] is not None:
            lines.append(f"<h3>the document itself</h3><div class=text>{prompt}{text(sample['reference'])}</div>")
        parts.append(f"<div class=sample>{''.join(lines)}</div>")
    return "\n".join(parts)


def _method(continuation: Mapping[str, Any]) -> str:
    if continuation["method"] == "greedy":
        return "most likely token each time"
    among = f"the {continuation['top_k']} most likely" if continuation["top_k"] else "all tokens"
    return f"drawn among {among}, temperature {continuation['temperature']:g}, seed {continuation['seed']}"


def _facts(evaluation: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{text(name.replace('_', ' '))}</td><td>{_fact(value)}</td></tr>"
        for name, value in evaluation["provenance"].items()
        if value not in ("", None)
    )
    return f"<table class=facts><tbody>{rows}</tbody></table>"


def _fact(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else f"<code>{text(value)}</code>"
