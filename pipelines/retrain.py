"""Tune on what is new since the champion, compare with the champion, and promote the better one: the one to schedule.

Each parameter is one step's section of the recipe, as `modelmill.components.core.step.section` writes it. Without new
records the run ends after it has said so. The last step reports however the run ended.
"""

from kfp import dsl

from modelmill.components.data import component as data
from modelmill.components.evaluation import component as evaluation
from modelmill.components.finetuning import component as finetuning
from modelmill.components.registry import component as registry
from modelmill.pipelines.naming import named

_fetch_base = named(registry.fetch_model, "fetch_base")
_fetch_champion = named(registry.fetch_model, "fetch_champion")
_generate_champion = named(evaluation.generate, "generate_champion")
_generate_tuned = named(evaluation.generate, "generate_tuned")
_score_champion = named(evaluation.score_generations, "score_champion")
_score_tuned = named(evaluation.score_generations, "score_tuned")
_score_texts_champion = named(evaluation.score_texts, "score_texts_champion")
_score_texts_tuned = named(evaluation.score_texts, "score_texts_tuned")
_register_model = named(registry.register_tuned, "register_model")


@dsl.pipeline(name="retrain", description="Tune on new data and promote the result where it beats the champion.")
def retrain(
    fetch_base: str,
    fetch_champion: str,
    ingest_corpus: str,
    prepare_instructions: str,
    find_new_data: str,
    finetune: str,
    merge_adapter: str,
    generate_champion: str,
    generate_tuned: str,
    score_champion: str,
    score_tuned: str,
    score_texts_champion: str,
    score_texts_tuned: str,
    gate: str,
    register_model: str,
    promote: str,
    mirror_to_sagemaker: str,
    report_outcome: str,
) -> None:
    """Wire fetch -> prepare -> new? -> finetune -> merge -> generate and score -> gate -> register -> promote."""
    with dsl.ExitHandler(registry.report_outcome(section=report_outcome)):
        base = _fetch_base(section=fetch_base).outputs["manifest"]
        champion = _fetch_champion(section=fetch_champion).outputs["manifest"]
        corpus = data.ingest_corpus(section=ingest_corpus).outputs["manifest"]
        prepared = data.prepare_instructions(section=prepare_instructions, tokenizer=base, corpus=corpus)
        instructions = prepared.outputs["manifest"]
        news = registry.find_new_data(section=find_new_data, data=instructions, champion=champion)
        with dsl.If(news.outputs["Output"] == True, name="new-data"):  # noqa: E712 (kfp overloads the comparison)
            adapter = finetuning.finetune(section=finetune, instructions=instructions, base=base).outputs["manifest"]
            merged = finetuning.merge_adapter(section=merge_adapter, adapter=adapter, data=instructions, base=base)
            tuned = merged.outputs["manifest"]
            theirs = _generate_champion(section=generate_champion, model=champion, instructions=instructions)
            ours = _generate_tuned(section=generate_tuned, model=tuned, instructions=instructions)
            judged = evaluation.gate(
                section=gate,
                candidate=_score_tuned(section=score_tuned, generations=ours.outputs["manifest"]).outputs["manifest"],
                reference=_score_champion(section=score_champion, generations=theirs.outputs["manifest"]).outputs[
                    "manifest"
                ],
                guard_candidate=_score_texts_tuned(section=score_texts_tuned, model=tuned, corpus=corpus).outputs[
                    "manifest"
                ],
                guard_reference=_score_texts_champion(
                    section=score_texts_champion, model=champion, corpus=corpus
                ).outputs["manifest"],
            ).outputs["manifest"]
            registered = _register_model(
                section=register_model, model=tuned, evaluation=judged, instructions=instructions
            )
            entry = registered.outputs["manifest"]
            promotion = registry.promote(section=promote, registration=entry, gate=judged).outputs["manifest"]
            registry.mirror_to_sagemaker(section=mirror_to_sagemaker, registration=entry, promotion=promotion)
