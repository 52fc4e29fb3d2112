"""What the loss is over, against TRL: the labels that its `SFTTrainer` prepares from the same conversations.

TRL swaps a model's chat template for one of its own with `{% generation %}` marks. Given that template, ours are TRL's
labels to the token. Given the model's own, ours are too, but where TRL's marks begin before the generation prompt
ends: there TRL's labels of the same turn as prompt and completion are ours (docs/decisions/0011).
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.data.instruction_rows import open_instructions
from modelmill.components.data.instructions import prepare_instructions
from tests.components.data.conftest import Produce
from tests.components.data.instruction_data import (
    CONVERSATIONS,
    SPECIAL,
    TEMPLATES,
    chat,
    config,
    records_in,
    tokenizer_in,
    untagged,
)

found = importlib.util.find_spec("trl")
if found is None or found.origin is None:
    pytest.skip("trl is not installed", allow_module_level=True)
SHIPPED = Path(found.origin).parent / "chat_templates"

Turns = Sequence[tuple[str, str]]
Labels = tuple[list[int], list[int]]
"""Ids, and 1 for those that are learnt."""

# Templates that models ship, and what TRL's version of them learns before each answer and ours does not.
ALIKE = [
    "cohere",
    "cohere2",
    "gemma3",
    "lfm2",
    "lfm2_v2",
    "llama3",
    "phi3",
    "phi3_5",
    "qwen3_instruct_2507",
    "qwen3_vl",
]
EARLIER = {
    "qwen2_5": "\n",
    "deepseek_r1_distill": "<｜Assistant｜>",
    "deepseekv3": "<｜Assistant｜>",
    "nemotron_3_nano": "<think>",
    "nemotron_3_ultra": "<think>",
    "qwen3_8": "<think>\n",
}
OTHER_TEXT = ["qwen3", "glm4moe"]  # TRL's versions write another text
REFUSED = ["qwen3_5_think", "qwen3_6"]  # a turn is written anew once others follow
_SIGNS = re.compile(r"<\|[^|<>]+\|>|<｜[^<>]+?｜>|<(?:start|end)_of_turn>|</?think>")


def shipped(name: str) -> str:
    return (SHIPPED / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer_for(folder: Path, template: str) -> Manifest:
    """A tokenizer that has the special tokens of a template."""
    tokenizer_in(folder, template, trimmed=False)
    path = str(folder / "tokenizer.json")
    encoder = Tokenizer.from_file(path)
    signs = sorted(set(_SIGNS.findall(template)) - set(SPECIAL))
    encoder.add_special_tokens([AddedToken(sign, special=True, normalized=False) for sign in signs])
    encoder.save(path)
    return Manifest.describe(folder, kind="tokenizer")


def loaded(tokenizer: Manifest) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tokenizer.uri)


def trl_labels(tokenizer: Manifest, records: Sequence[dict[str, Any]], output: Path, **options: Any) -> list[Labels]:
    """What TRL's trainer prepares."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    theirs = loaded(tokenizer)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    trainer = SFTTrainer(
        LlamaForCausalLM(LlamaConfig(vocab_size=len(theirs), **sizes)),
        args=SFTConfig(output_dir=str(output), max_length=None, report_to="none", use_cpu=True, bf16=False, **options),
        train_dataset=Dataset.from_list(list(records)),
        processing_class=theirs,
    )
    return [(row["input_ids"], [int(label != -100) for label in row["labels"]]) for row in trainer.train_dataset]


def our_labels(
    produce: Produce, tokenizer: Manifest, records: Sequence[dict[str, Any]], path: Path, **values: Any
) -> list[Labels]:
    """What the step writes, in the order of the records."""
    chosen = config(records_in(path, records), sequence_length=4096, **values)
    instructions = produce(prepare_instructions, chosen, tokenizer=tokenizer)
    rows = open_instructions(instructions, "train")
    places = [(row, slice(first, first + length)) for row, first, length, _ in rows.places.tolist()]
    return [(rows.tokens[row, part].tolist(), rows.loss_mask[row, part].tolist()) for row, part in places]


def chats(conversations: dict[str, list[tuple[str, str]]] = CONVERSATIONS) -> list[dict[str, Any]]:
    return [chat(*turns) for turns in conversations.values()]


@pytest.mark.parametrize("name", [*ALIKE, *EARLIER, *OTHER_TEXT, *REFUSED])
def test_labels_are_those_of_trls_own_template(produce: Produce, tmp_path: Path, name: str) -> None:
    tokenizer = tokenizer_for(tmp_path / "tokenizer", shipped(name))
    theirs = trl_labels(tokenizer, chats(), tmp_path / "out", assistant_only_loss=True)
    marked = {"kind": "jinja", "path": str(SHIPPED / f"{name}_training.jinja")}
    assert our_labels(produce, tokenizer, chats(), tmp_path / "a.jsonl", template=marked) == theirs
    assert all(sum(mask) for _, mask in theirs)


@pytest.mark.parametrize("name", TEMPLATES)
def test_labels_of_templates_that_carry_marks(produce: Produce, tmp_path: Path, name: str) -> None:
    """ChatML, Llama 3, Mistral's [INST], plain roles: with their marks, and ours without them just the same."""
    tokenizer = tokenizer_for(tmp_path / "tokenizer", TEMPLATES[name])
    theirs = trl_labels(tokenizer, chats(), tmp_path / "out", assistant_only_loss=True)
    assert our_labels(produce, tokenizer, chats(), tmp_path / "a.jsonl") == theirs
    plain = {"kind": "jinja", "text": untagged(TEMPLATES[name])}
    assert our_labels(produce, tokenizer, chats(), tmp_path / "b.jsonl", template=plain) == theirs


@pytest.mark.parametrize("name", ALIKE)
def test_labels_of_templates_as_models_ship_them(produce: Produce, tmp_path: Path, name: str) -> None:
    tokenizer = tokenizer_for(tmp_path / "tokenizer", shipped(name))
    theirs = trl_labels(tokenizer, chats(), tmp_path / "out", assistant_only_loss=True)
    assert our_labels(produce, tokenizer, chats(), tmp_path / "a.jsonl") == theirs


@pytest.mark.parametrize(("name", "more"), EARLIER.items(), ids=EARLIER)
def test_trl_also_learns_what_the_prompt_holds(produce: Produce, tmp_path: Path, name: str, more: str) -> None:
    """Nothing else differs, and as prompt and completion TRL leaves it out as well."""
    tokenizer = tokenizer_for(tmp_path / "tokenizer", shipped(name))
    theirs = trl_labels(tokenizer, chats(), tmp_path / "out", assistant_only_loss=True)
    ours = our_labels(produce, tokenizer, chats(), tmp_path / "a.jsonl")
    shown = loaded(tokenizer)
    for turns, (ids, mask), (their_ids, their_mask) in zip(CONVERSATIONS.values(), ours, theirs, strict=True):
        assert ids == their_ids
        assert all(theirs >= mine for theirs, mine in zip(their_mask, mask, strict=True))
        extra = [number for number, mine, their in zip(ids, mask, their_mask, strict=True) if their > mine]
        assert shown.decode(extra) == more * sum(role == "assistant" for role, _ in turns)


@pytest.mark.parametrize("name", [*ALIKE, *EARLIER, *OTHER_TEXT, *REFUSED])
def test_labels_of_a_completion(produce: Produce, tmp_path: Path, name: str) -> None:
    """One answer: TRL tells it from the prompt by the ids that both begin with."""
    told = {key: turns for key, turns in CONVERSATIONS.items() if len(turns) < 4}
    tokenizer = tokenizer_for(tmp_path / "tokenizer", shipped(name))
    halves = [{"prompt": turns[:-1], "completion": turns[-1:]} for turns in told.values()]
    records = [{key: chat(*turns)["messages"] for key, turns in half.items()} for half in halves]
    theirs = trl_labels(tokenizer, records, tmp_path / "out")
    assert our_labels(produce, tokenizer, chats(told), tmp_path / "a.jsonl") == theirs


@pytest.mark.parametrize("name", OTHER_TEXT)
def test_trls_template_may_write_another_text(produce: Produce, tmp_path: Path, name: str) -> None:
    """Thoughts in every turn (Qwen 3), or the next turn's sign behind the last one (GLM 4)."""
    tokenizer = tokenizer_for(tmp_path / "tokenizer", shipped(name))
    theirs = trl_labels(tokenizer, chats(), tmp_path / "out", assistant_only_loss=True)
    ours = our_labels(produce, tokenizer, chats(), tmp_path / "a.jsonl")
    assert len(ours[-1][0]) < len(theirs[-1][0])
    assert ours[-1][0] == loaded(tokenizer).apply_chat_template(chats()[-1]["messages"])["input_ids"]


@pytest.mark.parametrize("name", REFUSED)
def test_turns_that_are_written_anew_are_refused(produce: Produce, tmp_path: Path, name: str) -> None:
    """The mask of an earlier turn would be a guess; the template with marks is asked for."""
    tokenizer = tokenizer_for(tmp_path / "tokenizer", shipped(name))
    with pytest.raises(UserError, match=r"a\.jsonl:1 cannot be masked: .* give a template with \{% generation %\}"):
        our_labels(produce, tokenizer, [chat(*CONVERSATIONS["multi"])], tmp_path / "a.jsonl")


PAIRS = [
    ("What is the capital of France?", "Paris."),
    ("What is the capi", "tal of France?"),  # in the middle of a word
    ("Answer: ", " two blanks meet here"),
    ("Lines end\n", "\n\nand others begin"),
    ("ünïcode 漢", "字 🜁"),
    ("a", "a"),
]


@pytest.mark.parametrize("bos", [False, True])
def test_labels_of_a_plain_prompt_and_completion(produce: Produce, tmp_path: Path, bos: bool) -> None:
    """Instruction and response: a token that holds the end of the one and the start of the other is learnt."""
    written = "### Instruction:\n{prompt}\n\n### Response:\n{completion}"
    tokenizer = tokenizer_in(tmp_path / "tokenizer", bos=bos, trimmed=False)
    for text in (written, "{prompt}{completion}"):
        before = text.removesuffix("{completion}")
        records = [{"prompt": before.format(prompt=one), "completion": two} for one, two in PAIRS]
        theirs = trl_labels(tokenizer, records, tmp_path / "out")
        pairs = [chat(("user", one), ("assistant", two)) for one, two in PAIRS]
        path = tmp_path / f"{len(text)}.jsonl"
        ours = our_labels(produce, tokenizer, pairs, path, template={"kind": "prompt", "text": text})
        assert ours == theirs
