"""Tune an embedding model on pairs, judge it against its base by held-out retrieval, and promote a better one.

Each parameter is one step's section of the recipe, as `modelmill.components.core.step.section` writes it.
"""

from kfp import dsl

from modelmill.components.embedding import component as embedding
from modelmill.components.evaluation import component as evaluation
from modelmill.components.registry import component as registry
from modelmill.pipelines.naming import named

_evaluate_base = named(embedding.evaluate_retrieval, "evaluate_base")
_evaluate_tuned = named(embedding.evaluate_retrieval, "evaluate_tuned")


@dsl.pipeline(name="embedding-finetune", description="Tune an embedding model and promote it where it beats its base.")
def embedding_finetune(
    fetch_model: str,
    prepare_pairs: str,
    finetune_embedding: str,
    evaluate_base: str,
    evaluate_tuned: str,
    gate: str,
    register_model: str,
    promote: str,
) -> None:
    """Wire pairs -> finetune -> retrieval, base and tuned -> gate -> register -> promote."""
    base = registry.fetch_model(section=fetch_model).outputs["manifest"]
    pairs = embedding.prepare_pairs(section=prepare_pairs).outputs["manifest"]
    tuned = embedding.finetune_embedding(section=finetune_embedding, pairs=pairs, base=base).outputs["manifest"]
    judged = evaluation.gate(
        section=gate,
        candidate=_evaluate_tuned(section=evaluate_tuned, model=tuned, pairs=pairs).outputs["manifest"],
        reference=_evaluate_base(section=evaluate_base, model=base, pairs=pairs).outputs["manifest"],
    ).outputs["manifest"]
    registered = registry.register_model(section=register_model, model=tuned, evaluation=judged)
    registry.promote(section=promote, registration=registered.outputs["manifest"], gate=judged)
