"""The page a reviewer opens: one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #12803c; --bad: #c5221f; --flat: #9a6700; }
@media (prefers-color-scheme: dark) { :root { --good: #5bd48a; --bad: #ff8a80; --flat: #ffc766; } }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem; }
p.note { opacity: .75; font-size: .875rem; margin: .5rem 0; max-width: 48rem; }
.verdict { border-left: .3rem solid; padding: .6rem 1rem; margin: 1.25rem 0; background: var(--soft);
  font-size: 1.1rem; }
.verdict.better { border-color: var(--good); } .verdict.worse { border-color: var(--bad); }
.verdict.unclear { border-color: var(--flat); }
.numbers { display: flex; flex-wrap: wrap; gap: .75rem; }
.numbers div { flex: 1 1 8.5rem; border: 1px solid var(--line); border-radius: .4rem; padding: .6rem .9rem; }
.numbers b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.numbers span { opacity: .75; font-size: .85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .925rem; }
th, td { text-align: right; padding: .4rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child { text-align: left; } thead th { font-weight: 600; }
table.facts td { text-align: left; overflow-wrap: anywhere; } table.facts td:first-child { white-space: nowrap; }
td.better { color: var(--good); } td.worse { color: var(--bad); }
svg { display: block; width: 100%; height: auto; margin: .5rem 0; }
figure { margin: 0 0 1.25rem; } figcaption { font-size: .875rem; opacity: .75; }
.sample { border: 1px solid var(--line); border-radius: .4rem; margin: 0 0 1rem; padding: .25rem 1rem .75rem; }
.sample h3 { font-size: .8rem; font-weight: 600; margin: .75rem 0 .2rem; opacity: .75; }
.text { font: .875rem/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 15rem;
  overflow-y: auto; }
.text mark { background: #4c8bf533; color: inherit; border-radius: .2rem; }
code { font: .85em ui-monospace, monospace; }
"""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
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
        "<h1>Held-out evaluation</h1>",
        f"<p class=note>Weights <code>{_text(evaluation['provenance']['weights_digest'])[:16]}</code>, "
        f"{evaluation['scored']['tokens']:,} tokens of text the model was not trained on.</p>",
        f'<div class="verdict {level}">{_text(sentence)}</div>',
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
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Held-out evaluation</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _text(value: object) -> str:
    """Text that cannot become markup; control characters, which a small model does write, are made visible."""
    return html.escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(value)))


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
    page = (
        f"<figure>{figures['loss']}<figcaption>Loss by optimizer step; {shown}.</figcaption></figure>"
        f"<figure>{figures['learning_rate']}<figcaption>Learning rate.</figcaption></figure>"
    )
    if "grad_norm" in figures:
        page += (
            f"<figure>{figures['grad_norm']}<figcaption>Norm of the gradient before clipping.</figcaption></figure>"
        )
    return page


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
        rows.append(f"<tr><td>{_text(_NAMES.get(name, name))}</td>{numbers}<td class='{kind}'>{gap}</td></tr>")
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
    return table + "".join(f"<p class=note>{_text(note)}</p>" for note in notes)


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    if not samples:
        return "<p class=note>No samples were asked for.</p>"
    parts = ["<p class=note>What the model was given, then, marked, what it wrote.</p>"]
    for sample in samples:
        prompt = _text(sample["prompt"])
        lines = []
        for continuation in sample["continuations"]:
            lines.append(f"<h3>{_text(_method(continuation))}</h3>")
            lines.append(f"<div class=text>{prompt}<mark>{_text(continuation['text'])}</mark></div>")
        if sample["reference"] is not None:
            lines.append(f"<h3>the document itself</h3><div class=text>{prompt}{_text(sample['reference'])}</div>")
        parts.append(f"<div class=sample>{''.join(lines)}</div>")
    return "\n".join(parts)


def _method(continuation: Mapping[str, Any]) -> str:
    if continuation["method"] == "greedy":
        return "most likely token each time"
    among = f"the {continuation['top_k']} most likely" if continuation["top_k"] else "all tokens"
    return f"drawn among {among}, temperature {continuation['temperature']:g}, seed {continuation['seed']}"


def _facts(evaluation: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{_text(name.replace('_', ' '))}</td><td>{_fact(value)}</td></tr>"
        for name, value in evaluation["provenance"].items()
        if value not in ("", None)
    )
    return f"<table class=facts><tbody>{rows}</tbody></table>"


def _fact(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else f"<code>{_text(value)}</code>"
