"""Pretrain the champion further on new text, and promote the result where it beats the champion: to be scheduled.

Each parameter is one step's section of the recipe, as `modelmill.components.core.step.section` writes it. Without new
documents the run ends after it has said so. The last step reports however the run ended.
"""

from kfp import dsl

from modelmill.components.data import component as data
from modelmill.components.evaluation import component as evaluation
from modelmill.components.llama import component as llama
from modelmill.components.registry import component as registry
from modelmill.pipelines.naming import named

_fetch_champion = named(registry.fetch_model, "fetch_champion")
_score_texts_champion = named(evaluation.score_texts, "score_texts_champion")
_score_texts_tuned = named(evaluation.score_texts, "score_texts_tuned")


@dsl.pipeline(name="continue-pretraining", description="Pretrain the champion further and promote what beats it.")
def continue_pretraining(
    fetch_champion: str,
    ingest_corpus: str,
    find_new_data: str,
    take_tokenizer: str,
    pack_tokens: str,
    continue_pretraining: str,
    score_texts_champion: str,
    score_texts_tuned: str,
    gate: str,
    register_model: str,
    promote: str,
    report_outcome: str,
) -> None:
    """Wire fetch -> ingest -> new? -> pack -> pretrain -> score both -> gate -> register -> promote."""
    with dsl.ExitHandler(registry.report_outcome(section=report_outcome)):
        champion = _fetch_champion(section=fetch_champion).outputs["manifest"]
        corpus = data.ingest_corpus(section=ingest_corpus).outputs["manifest"]
        news = registry.find_new_data(section=find_new_data, data=corpus, champion=champion)
        with dsl.If(news.outputs["Output"] == True, name="new-data"):  # noqa: E712 (kfp overloads the comparison)
            tokenizer = data.take_tokenizer(section=take_tokenizer, model=champion, corpus=corpus)
            tokens = data.pack_tokens(section=pack_tokens, corpus=corpus, tokenizer=tokenizer.outputs["manifest"])
            trained = llama.continue_pretraining(
                section=continue_pretraining, base=champion, corpus=corpus, tokens=tokens.outputs["manifest"]
            ).outputs["manifest"]
            theirs = _score_texts_champion(section=score_texts_champion, model=champion, corpus=corpus)
            ours = _score_texts_tuned(section=score_texts_tuned, model=trained, corpus=corpus)
            judged = evaluation.gate(
                section=gate, candidate=ours.outputs["manifest"], reference=theirs.outputs["manifest"]
            ).outputs["manifest"]
            registered = registry.register_model(section=register_model, model=trained, evaluation=judged)
            registry.promote(section=promote, registration=registered.outputs["manifest"], gate=judged)
