"""Tune a language model on instructions, judge it against its base, and promote it where it is better.

Each parameter is one step's section of the recipe, as `modelmill.components.core.step.section` writes it.
"""

from kfp import dsl

from modelmill.components.data import component as data
from modelmill.components.evaluation import component as evaluation
from modelmill.components.finetuning import component as finetuning
from modelmill.components.registry import component as registry
from modelmill.pipelines.naming import named

_generate_base = named(evaluation.generate, "generate_base")
_generate_tuned = named(evaluation.generate, "generate_tuned")
_score_base = named(evaluation.score_generations, "score_base")
_score_tuned = named(evaluation.score_generations, "score_tuned")
_score_texts_base = named(evaluation.score_texts, "score_texts_base")
_score_texts_tuned = named(evaluation.score_texts, "score_texts_tuned")
_register_model = named(registry.register_tuned, "register_model")


@dsl.pipeline(name="lora-finetune", description="Tune a language model and promote it where it beats its base.")
def lora_finetune(
    fetch_model: str,
    ingest_corpus: str,
    prepare_instructions: str,
    finetune: str,
    merge_adapter: str,
    generate_base: str,
    generate_tuned: str,
    score_base: str,
    score_tuned: str,
    score_texts_base: str,
    score_texts_tuned: str,
    gate: str,
    register_model: str,
    promote: str,
    mirror_to_sagemaker: str,
) -> None:
    """Wire prepare -> finetune -> merge -> generate and score, tuned and base -> gate -> register -> promote."""
    base = registry.fetch_model(section=fetch_model).outputs["manifest"]
    corpus = data.ingest_corpus(section=ingest_corpus).outputs["manifest"]
    prepared = data.prepare_instructions(section=prepare_instructions, tokenizer=base, corpus=corpus)
    instructions = prepared.outputs["manifest"]
    adapter = finetuning.finetune(section=finetune, instructions=instructions, base=base).outputs["manifest"]
    merged = finetuning.merge_adapter(section=merge_adapter, adapter=adapter, data=instructions, base=base)
    tuned = merged.outputs["manifest"]

    base_texts = _generate_base(section=generate_base, model=base, instructions=instructions).outputs["manifest"]
    tuned_texts = _generate_tuned(section=generate_tuned, model=tuned, instructions=instructions).outputs["manifest"]
    base_kept = _score_texts_base(section=score_texts_base, model=base, corpus=corpus).outputs["manifest"]
    tuned_kept = _score_texts_tuned(section=score_texts_tuned, model=tuned, corpus=corpus).outputs["manifest"]
    judged = evaluation.gate(
        section=gate,
        candidate=_score_tuned(section=score_tuned, generations=tuned_texts).outputs["manifest"],
        reference=_score_base(section=score_base, generations=base_texts).outputs["manifest"],
        guard_candidate=tuned_kept,
        guard_reference=base_kept,
    ).outputs["manifest"]

    registered = _register_model(section=register_model, model=tuned, evaluation=judged, instructions=instructions)
    entry = registered.outputs["manifest"]
    promotion = registry.promote(section=promote, registration=entry, gate=judged).outputs["manifest"]
    registry.mirror_to_sagemaker(section=mirror_to_sagemaker, registration=entry, promotion=promotion)
