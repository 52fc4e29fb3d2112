"""Tune a language model on pairs of answers (DPO), judge it on held-out pairs, and promote it where it learnt them.

Each parameter is one step's section of the recipe, as `modelmill.components.core.step.section` writes it.
"""

from kfp import dsl

from modelmill.components.data import component as data
from modelmill.components.evaluation import component as evaluation
from modelmill.components.finetuning import component as finetuning
from modelmill.components.registry import component as registry
from modelmill.pipelines.naming import named

_score_pairs_base = named(evaluation.score_preferences, "score_pairs_base")
_score_pairs_tuned = named(evaluation.score_preferences, "score_pairs_tuned")
_score_texts_base = named(evaluation.score_texts, "score_texts_base")
_score_texts_tuned = named(evaluation.score_texts, "score_texts_tuned")
_register_model = named(registry.register_tuned, "register_model")


@dsl.pipeline(name="preference-tuning", description="Tune a language model on pairs of answers and promote it.")
def preference_tuning(
    fetch_model: str,
    ingest_corpus: str,
    prepare_preferences: str,
    dpo: str,
    merge_adapter: str,
    score_pairs_base: str,
    score_pairs_tuned: str,
    score_texts_base: str,
    score_texts_tuned: str,
    gate: str,
    register_model: str,
    promote: str,
    mirror_to_sagemaker: str,
) -> None:
    """Wire prepare -> dpo -> merge -> score pairs and texts, tuned and base -> gate -> register -> promote."""
    base = registry.fetch_model(section=fetch_model).outputs["manifest"]
    corpus = data.ingest_corpus(section=ingest_corpus).outputs["manifest"]
    prepared = data.prepare_preferences(section=prepare_preferences, tokenizer=base, corpus=corpus)
    preferences = prepared.outputs["manifest"]
    adapter = finetuning.dpo(section=dpo, preferences=preferences, base=base).outputs["manifest"]
    merged = finetuning.merge_adapter(section=merge_adapter, adapter=adapter, data=preferences, base=base)
    tuned = merged.outputs["manifest"]
    theirs = _score_pairs_base(section=score_pairs_base, model=base, preferences=preferences)
    ours = _score_pairs_tuned(section=score_pairs_tuned, model=tuned, preferences=preferences)
    judged = evaluation.gate(
        section=gate,
        candidate=ours.outputs["manifest"],
        reference=theirs.outputs["manifest"],
        guard_candidate=_score_texts_tuned(section=score_texts_tuned, model=tuned, corpus=corpus).outputs["manifest"],
        guard_reference=_score_texts_base(section=score_texts_base, model=base, corpus=corpus).outputs["manifest"],
    ).outputs["manifest"]
    registered = _register_model(section=register_model, model=tuned, evaluation=judged, instructions=preferences)
    entry = registered.outputs["manifest"]
    promotion = registry.promote(section=promote, registration=entry, gate=judged).outputs["manifest"]
    registry.mirror_to_sagemaker(section=mirror_to_sagemaker, registration=entry, promotion=promotion)
