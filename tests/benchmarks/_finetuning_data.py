"""What the peers of the fine-tuning benchmark learn: real text whose lengths vary as those of instruction sets do.

Asked is what a documented function or class does, and answered with its documentation as far as whole paragraphs fit
into 1500 characters: a sentence or a page. Of eight in a batch, as many as TRL takes by default, less than half of
what is computed is then real; Hugging Face gives up to 2x for leaving padding out of published instruction sets
(https://huggingface.co/blog/packing-with-FA2), so those are about half padding too.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepFunction
from modelmill.components.data.instruction_rows import open_instructions
from tests.benchmarks._finetuning_peers import ADAPTER, CONVERSATIONS, ROW, SEED, conversations_of, instructions_in

DISTRIBUTIONS = ["numpy", "pydantic", "click", "Flask", "fsspec"]
TEMPLATE = "### Question:\n{prompt}\n\n### Answer:\n{completion}"
SHORTEST, LONGEST = 20, 1500  # characters of an answer
SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": ROW,
}


def questions() -> Iterator[dict[str, str]]:
    """Prompts and completions."""
    from modelmill.components.data.installed_docs import read_documentation

    for document in read_documentation(DISTRIBUTIONS, 100, Counter()):
        for entry in document.entries:
            answer = first_paragraphs(entry.text)
            if entry.kind != "module" and len(answer) >= SHORTEST:
                prompt = f"What does `{entry.signature}` in the module `{document.module}` do?"
                yield {"prompt": prompt, "completion": answer}


def first_paragraphs(text: str) -> str:
    """As many whole paragraphs of a text as are allowed; empty where the first alone is too long."""
    answer = ""
    for paragraph in text.strip().split("\n\n"):
        longer = f"{answer}\n\n{paragraph}".strip()
        if len(longer) > LONGEST:
            break
        answer = longer
    return answer


def prepare(folder: Path) -> None:
    """Questions and answers through the pipeline's own steps, a model with random weights and a first adapter."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from modelmill.components.data.config import CorpusConfig, TokenizerConfig
    from modelmill.components.data.corpus import ingest_corpus
    from modelmill.components.data.instruction_config import InstructionsConfig
    from modelmill.components.data.instructions import prepare_instructions
    from modelmill.components.data.tokenizer import train_tokenizer
    from modelmill.components.finetuning import adapters

    def produce(name: str, step: StepFunction, config: Any, **upstream: Manifest) -> Manifest:
        output = folder / name
        output.mkdir()
        result = step(config, output, **upstream)
        return Manifest.describe(output, kind=result.kind, counts=result.counts, metadata=result.metadata)

    source = {"type": "installed-docs", "distributions": DISTRIBUTIONS}
    corpus = produce("corpus", ingest_corpus, CorpusConfig.model_validate({"source": source}))
    sizes = TokenizerConfig(vocab_size=SIZES["vocab_size"])
    tokenizer = produce("tokenizer", train_tokenizer, sizes, corpus=corpus)
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in questions()))
    asked = {
        "source": {"type": "files", "paths": [str(file)], "records": {"format": "completion"}},
        "template": {"kind": "prompt", "text": TEMPLATE},
        "sequence_length": ROW - 1,  # a row of ours holds one token more, the last one's target
        "too_long": "drop",
        "validation_fraction": 0,
        "test_fraction": 0,
    }
    chosen = InstructionsConfig.model_validate(asked)
    prepared = produce("instructions", prepare_instructions, chosen, tokenizer=tokenizer)
    (folder / "instructions.json").write_text(prepared.model_dump_json())
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(str(folder / "model"))
    names = adapters.add_adapters(model, ADAPTER, dora=False, seed=SEED)
    record = adapters.peft_config(ADAPTER, names, dora=False, base=str(folder / "model"))
    adapters.write_adapter(folder / "adapter", adapters.gather_adapters(model, True), record)


def describe(folder: Path) -> None:
    """Say what is learnt and how much of what is computed is real."""
    rows = open_instructions(instructions_in(folder), "train")
    lengths = [len(ids) for ids, _ in conversations_of(rows)]
    whole = len(lengths) // CONVERSATIONS * CONVERSATIONS
    batches = [lengths[first : first + CONVERSATIONS] for first in range(0, whole, CONVERSATIONS)]
    padded = sum(lengths[:whole]) / sum(max(batch) * len(batch) for batch in batches)
    targets, mean = int(rows.targets.sum()) / sum(lengths), sum(lengths) / len(lengths)
    print(f"{len(lengths)} conversations of {min(lengths)} to {max(lengths)} tokens, {mean:.0f} in the mean;")
    print(f"{100 * targets:.0f} % of them are answers. Of what is computed {100 * padded:.0f} % are real where padded")
    print(f"and {100 * sum(lengths) / (len(rows) * ROW):.0f} % in our rows")
