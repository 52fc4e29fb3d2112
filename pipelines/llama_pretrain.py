"""Pretrain a Llama from raw text to a registered model.

Each parameter is one step's section of the recipe, as `modelmill.components.core.step.section` writes it.
"""

from kfp import dsl

from modelmill.components.data import component as data
from modelmill.components.evaluation import component as evaluation
from modelmill.components.llama import component as llama
from modelmill.components.registry import component as registry


@dsl.pipeline(name="llama-pretrain", description="Pretrain a Llama from raw text to a registered model.")
def llama_pretrain(
    ingest_corpus: str,
    train_tokenizer: str,
    pack_tokens: str,
    pretrain: str,
    evaluate_heldout: str,
    register_model: str,
) -> None:
    """Wire ingest -> tokenizer -> pack -> pretrain -> evaluate -> register."""
    corpus = data.ingest_corpus(section=ingest_corpus).outputs["manifest"]
    tokenizer = data.train_tokenizer(section=train_tokenizer, corpus=corpus).outputs["manifest"]
    tokens = data.pack_tokens(section=pack_tokens, corpus=corpus, tokenizer=tokenizer).outputs["manifest"]
    model = llama.pretrain(section=pretrain, tokenizer=tokenizer, tokens=tokens).outputs["manifest"]
    judged = evaluation.evaluate_heldout(section=evaluate_heldout, model=model, tokens=tokens).outputs["manifest"]
    registry.register_model(section=register_model, model=model, evaluation=judged)
