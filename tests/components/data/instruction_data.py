"""A tokenizer with the special tokens of common chat formats, and conversations in all their shapes."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from modelmill.components.core.manifest import Manifest
from modelmill.components.data.conversations import Message
from modelmill.components.data.instruction_config import InstructionsConfig

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>\\n' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
# The system message stands in the last turn of the user, so a turn's text moves when others follow.
MISTRAL = (
    "{{ bos_token }}{% set ns = namespace(system='', last=0) %}"
    "{% for m in messages %}{% if m['role'] == 'system' %}{% set ns.system = m['content'] + '\\n\\n' %}"
    "{% elif m['role'] == 'user' %}{% set ns.last = loop.index %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (ns.system if loop.index == ns.last else '') + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
# No special token at all; the line end closes a turn.
PLAIN = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'Assistant:' }}"
    "{% generation %}{{ ' ' + m['content'] + '\\n' }}{% endgeneration %}"
    "{% else %}{{ m['role'] | title + ': ' + m['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# As in models that think: the generation prompt goes further than a turn that was said, and thoughts are dropped.
THINKING = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>' }}"
    "{% generation %}{{ m['content'].split('</think>')[-1] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ '<|user|>' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"
)
# Closed once, behind the last turn, by a token of its own.
CLOSED = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|end|>' }}{% if loop.last %}{{ eos_token }}{% endif %}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|end|>' }}{% endif %}{{ '' if loop.last else '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|assistant|>\\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "plain": PLAIN,
    "thinking": THINKING,
    "closed": CLOSED,
}
SPECIAL = [
    *("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("[INST]", "[/INST]", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
]
TEXT = (
    "What is the capital of France? The capital of France is Paris. Assistant: User: system\n\n"
    "How many legs has a spider? A spider has eight legs, ünïcode and 漢字 as well. "
)

CONVERSATIONS: dict[str, list[tuple[str, str]]] = {
    "single": [("user", "What is 2+2?"), ("assistant", "It is 4.")],
    "system": [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello — ünïcode 漢字 🜁.")],
    "multi": [("user", "One?"), ("assistant", "1"), ("user", "Two?\n\nPlease."), ("assistant", "2\n\nReally: 2.")],
    "repeated": [
        *[("system", "b"), ("user", "a"), ("assistant", "b"), ("user", "a"), ("assistant", "b")],
        *[("user", "user"), ("assistant", "assistant")],
    ],
}


def untagged(template: str) -> str:
    """A template without its generation marks, as tokenizers have them."""
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def messages(turns: Sequence[tuple[str, str]]) -> list[Message]:
    return [Message(role, content) for role, content in turns]


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    """A record in the form most data sets have."""
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@functools.cache
def _encoder(bos: bool, trimmed: bool) -> str:
    encoder = Tokenizer(models.BPE())
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    tokens = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    encoder.train_from_iterator([TEXT, "\n".join(TEMPLATES.values())], trainer)
    offsets = processors.ByteLevel(trim_offsets=trimmed)
    begun = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", encoder.token_to_id("<s>"))])
    encoder.post_processor = processors.Sequence([offsets, begun]) if bos else offsets
    return encoder.to_str()


def tokenizer_in(folder: Path, template: str | None = None, *, bos: bool = False, trimmed: bool = True) -> Manifest:
    """A byte-level tokenizer artifact; `bos` makes it begin every text with `<s>`,
    `trimmed` leaves blanks out of the offsets (as Llama 3's does)."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(_encoder(bos, trimmed))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
    }
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Manifest.describe(folder, kind="tokenizer")


def records_in(path: Path, records: Sequence[Any]) -> Path:
    """A JSON lines file of records; text is written as it is."""
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def config(source: Any, **values: Any) -> InstructionsConfig:
    """A section for files of chat records, with shares large enough for small data."""
    if isinstance(source, Path):
        source = {"type": "files", "paths": [str(source)]}
    defaults = {"sequence_length": 64, "validation_fraction": 0.0, "test_fraction": 0.0}
    return InstructionsConfig.model_validate({"source": source} | defaults | values)
