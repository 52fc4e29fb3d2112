"""Pairs of answers: every form of record, what is wrong with one, and the rows that the step leaves."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.data.chat_template import open_template
from modelmill.components.data.conversations import BadRecord, Message
from modelmill.components.data.documents import SPLITS
from modelmill.components.data.instruction_rows import IGNORE, open_instructions
from modelmill.components.data.preference_config import ChatPairs, PreferencesConfig, TextPairs
from modelmill.components.data.preference_records import Pair, read_documented, read_pair
from modelmill.components.data.preference_rows import PreferenceSource, open_preferences, read_pairs
from modelmill.components.data.preferences import prepare_preferences
from modelmill.components.data.tokenizer_files import load_tokenizer
from tests.components.data.conftest import DISTRIBUTIONS, Produce
from tests.components.data.instruction_data import CHATML, LLAMA3, THINKING, records_in, tokenizer_in, untagged

CHAT, TEXT = ChatPairs(format="chat"), TextPairs(format="text")
SHARES = {"validation_fraction": 0.2, "test_fraction": 0.2}


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def pair(number: int, **changes: Any) -> dict[str, Any]:
    """TRL's explicit form with messages."""
    record = {
        "prompt": [turn("user", f"What is {number} + {number}?")],
        "chosen": [turn("assistant", f"It is {number + number}.")],
        "rejected": [turn("assistant", "I do not know. " * (1 + number % 3))],
    }
    return {**record, **changes}


def section(source: Any, **values: Any) -> PreferencesConfig:
    if isinstance(source, Path):
        source = {"type": "files", "paths": [str(source)]}
    defaults = {"sequence_length": 96, "validation_fraction": 0.0, "test_fraction": 0.0}
    return PreferencesConfig.model_validate({"source": source} | defaults | values)


@pytest.fixture
def chatml(tmp_path: Path) -> Manifest:
    return tokenizer_in(tmp_path / "tokenizer", untagged(CHATML))


def test_every_form_of_a_record_is_the_same_pair() -> None:
    expected = Pair(
        (Message("user", "Why?"),), Message("assistant", "Because it is so."), Message("assistant", "No idea.")
    )
    asked, good, bad = turn("user", "Why?"), turn("assistant", "Because it is so."), turn("assistant", "No idea.")
    forms: list[tuple[dict[str, Any], ChatPairs | TextPairs]] = [
        ({"prompt": [asked], "chosen": [good], "rejected": [bad]}, CHAT),
        ({"chosen": [asked, good], "rejected": [asked, bad]}, CHAT),
        ({"prompt": "Why?", "chosen": [good], "rejected": [bad]}, CHAT),
        ({"prompt": "Why?", "chosen": [asked, good], "rejected": [asked, bad]}, ChatPairs(format="chat", prompt=None)),
        ({"prompt": "Why?", "chosen": "Because it is so.", "rejected": "No idea."}, TEXT),
        (
            {"q": "Why?", "a": "Because", "b": "it is so.", "worse": "No idea."},
            TextPairs(format="text", prompt="{q}", chosen="{a} {b}", rejected="{worse}"),
        ),
        (
            {
                "good": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because it is so."}],
                "bad": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "No idea."}],
            },
            ChatPairs(
                format="chat",
                chosen="good",
                rejected="bad",
                role="from",
                content="value",
                roles={"human": "user", "gpt": "assistant"},
            ),
        ),
    ]
    for record, form in forms:
        assert read_pair(record, form, None) == expected
        with_system = read_pair(record, form, "Be brief.")
        assert with_system.prompt == (Message("system", "Be brief."), *expected.prompt)
    longer = {"chosen": [asked, bad, asked, good], "rejected": [asked, bad, asked, bad]}
    assert len(read_pair(longer, CHAT, None).prompt) == 3


@pytest.mark.parametrize(
    ("record", "form", "reason", "message"),
    [
        (pair(1, rejected=[turn("assistant", "It is 2. ")]), CHAT, "equal_answers", "same answer as chosen"),
        (pair(1, chosen=[turn("assistant", " ")]), CHAT, "empty_content", r"prompt \+ chosen\[1\].content is empty"),
        (pair(1, chosen="It is 2."), CHAT, "wrong_type", "chosen is text, not a list .* set records.format to text"),
        (pair(1), TEXT, "wrong_type", "chosen is a list, not text; set records.format to chat"),
        (pair(1, chosen=[]), CHAT, "no_messages", "chosen is an empty list"),
        (pair(1, prompt=7), CHAT, "wrong_type", "prompt is int, not messages or text"),
        ({"prompt": "Why?"}, CHAT, "missing_field", "has no field 'chosen' but 'prompt'"),
        ({"prompt": "Why?", "chosen": "a"}, TEXT, "missing_field", "has no field 'rejected'"),
        ({"prompt": "Why?", "chosen": "", "rejected": "b"}, TEXT, "empty_content", "is empty"),
        (pair(1, rejected=[turn("user", "Well?")]), CHAT, "no_assistant", "no turn of the assistant"),
        ([1], CHAT, "wrong_type", "is a list, not an object"),
        (ValueError("bad"), CHAT, "not_json", "is not JSON"),
        (
            {
                "chosen": [turn("user", "Why?"), turn("assistant", "a")],
                "rejected": [turn("user", "How?"), turn("assistant", "b")],
            },
            CHAT,
            "different_prompts",
            "different prompts: they differ in message 1",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_what_is_wrong_with_a_record(record: Any, form: ChatPairs | TextPairs, reason: str, message: str) -> None:
    with pytest.raises(BadRecord, match=message) as error:
        read_pair(record, form, None)
    assert error.value.reason == reason
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("template", [CHATML, LLAMA3], ids=["chatml", "llama3"])
def test_rows_are_both_conversations_with_the_last_answer_as_target(
    tmp_path: Path, produce: Produce, template: str, kind: str
) -> None:
    tokenizer = tokenizer_in(tmp_path / "tokenizer", untagged(template))
    records = [pair(number) for number in range(60)]
    records[7]["prompt"] = [turn("user", "Hi"), turn("assistant", "Hello."), turn("user", "Again?")]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        records_in(path, records)
    else:
        pq.write_table(pa.Table.from_pylist(records), path)
    made = produce(prepare_preferences, section(path, **SHARES), tokenizer=tokenizer)
    files = load_tokenizer(tokenizer)
    written = open_template(made.metadata["template"], files)
    prompts: dict[str, str] = {}
    for split in SPLITS:
        rows, said = open_preferences(made, split), list(read_pairs(made, split))
        assert len(rows) == len(said) == made.counts[f"{split}_pairs"] > 4
        assert made.counts[f"{split}_rows"] == 2 * len(rows)
        assert made.counts[f"{split}_targets"] == rows.targets.sum()
        tokens, targets = rows.take(np.arange(len(rows)))
        assert tokens.shape == targets.shape == (len(rows), 2, 96)
        for number, record in enumerate(said):
            assert prompts.setdefault(json.dumps(record["prompt"]), split) == split
            prompt = [Message(**message) for message in record["prompt"]]
            for side, name in enumerate(("chosen", "rejected")):
                text = written.render([*prompt, Message("assistant", record[name])]).text
                ids, mask = rows.conversation(number, side)
                assert ids.tolist() == files.encoder.encode(text, add_special_tokens=False).ids
                learnt = files.encoder.decode(ids[mask].tolist(), skip_special_tokens=True)
                assert learnt.strip() == record[name].strip()
                counted = targets[number, side][targets[number, side] != IGNORE]
                assert counted.tolist() == ids[mask].tolist()
    plain = open_instructions(made, "train")  # what reads prepared conversations reads these rows too
    assert (
        plain.take(slice(0, 2)).tokens.tolist() == open_preferences(made, "train").take(np.array([0]))[0][0].tolist()
    )
    preview = (Path(made.uri) / "preview.txt").read_text()
    assert "train, pair 1, chosen:" in preview
    assert "train, pair 3, rejected:" in preview


def test_equal_inputs_give_equal_bytes_and_another_seed_another_split(
    tmp_path: Path, produce: Produce, chatml: Manifest
) -> None:
    path = records_in(tmp_path / "a.jsonl", [pair(number) for number in range(60)])
    first, again, other = (
        produce(prepare_preferences, section(path, **SHARES, seed=seed), tokenizer=chatml) for seed in (0, 0, 1)
    )
    assert first.digest == again.digest != other.digest


def test_pairs_that_are_dropped_are_counted(tmp_path: Path, produce: Produce, chatml: Manifest) -> None:
    far = "so far and wide " * 60
    records = [
        *(pair(number) for number in range(20)),
        pair(3),
        pair(30, chosen=[turn("assistant", far)]),
        pair(31, chosen=[turn("assistant", far + "yes")], rejected=[turn("assistant", far + "no")]),
        pair(32, prompt=[turn("user", far)]),
        pair(33, chosen=[turn("assistant", "<|im_end|>")]),
    ]
    path = records_in(tmp_path / "a.jsonl", records)
    made = produce(prepare_preferences, section(path, max_bad_records=1), tokenizer=chatml)
    found = {name: count for name, count in made.counts.items() if name.startswith("dropped_") and count}
    assert found == {"dropped_duplicate": 1, "dropped_too_long": 3, "dropped_special_token": 1}
    assert (made.counts["train_pairs"], made.counts["read_records"]) == (20, 25)
    cut = produce(prepare_preferences, section(path, max_bad_records=1, too_long="truncate"), tokenizer=chatml)
    assert (cut.counts["dropped_unlearnt"], cut.counts["dropped_equal_tokens"]) == (1, 1)
    assert (cut.counts["train_pairs"], cut.counts["truncated"]) == (21, 1)


def test_held_out_sources_keep_their_prompts_for_themselves(
    tmp_path: Path, produce: Produce, chatml: Manifest
) -> None:
    train = records_in(tmp_path / "train.jsonl", [pair(number) for number in range(10)])
    test = records_in(tmp_path / "test.jsonl", [pair(number, rejected=[turn("assistant", "?")]) for number in (2, 5)])
    sources = [
        {"type": "files", "paths": [str(train)], "into": "train"},
        {"type": "files", "paths": [str(test)], "into": "test"},
    ]
    made = produce(prepare_preferences, section(sources), tokenizer=chatml)
    assert [made.counts[f"{split}_pairs"] for split in SPLITS] == [8, 0, 2]
    assert made.counts["dropped_in_other_split"] == 2
    assert len(open_preferences(made, "validation")) == 0


def test_batches_are_the_same_on_any_number_of_ranks(tmp_path: Path, produce: Produce, chatml: Manifest) -> None:
    path = records_in(tmp_path / "a.jsonl", [pair(number) for number in range(20)])
    source = PreferenceSource(
        open_preferences(produce(prepare_preferences, section(path), tokenizer=chatml), "train"), 3, 8
    )
    met = Counter(int(n) for step in range(5) for n in source.indices(step))
    assert set(met.values()) == {2}
    for step in range(3):
        shares = [source.indices_of(step, rank, 4) for rank in range(4)]
        assert np.array_equal(np.concatenate(shares), source.indices(step))
        longest = source.rows.sizes[source.indices(step)].max()
        assert longest - 1 <= source.width(step) < longest - 1 + 96 // 8


def test_real_pairs_from_documentation(tmp_path: Path, produce: Produce, chatml: Manifest) -> None:
    documented = {"type": "installed-docs-qa", "distributions": DISTRIBUTIONS}
    config = section(documented, sequence_length=384, **SHARES)
    made = produce(prepare_preferences, config, tokenizer=chatml)
    again = produce(prepare_preferences, section(documented, sequence_length=384, **SHARES, seed=1), tokenizer=chatml)
    assert made.digest != again.digest
    answers = {split: {record["chosen"] for record in read_pairs(made, split)} for split in SPLITS}
    everything = list(read_documented(config.source[0], config, None, Counter()))  # type: ignore[arg-type]
    known = {split: {found.chosen.content for _, found, place in everything if place == split} for split in SPLITS}
    for split in SPLITS:
        records = list(read_pairs(made, split))
        assert len(records) > 10
        assert all(record["rejected"] in known[split] for record in records)
        assert all(record["rejected"].lower() != record["chosen"].lower() for record in records)
        assert len({record["rejected"] for record in records}) > len(records) / 3
    assert not answers["train"] & answers["test"]
    first, second = ({r["id"]: r["rejected"] for s in SPLITS for r in read_pairs(m, s)} for m in (made, again))
    assert len(first.keys() & second.keys()) < len(first) / 4


def test_bad_input_is_one_line(tmp_path: Path, produce: Produce, chatml: Manifest) -> None:
    def refused(match: str, config: PreferencesConfig, tokenizer: Manifest = chatml) -> None:
        with pytest.raises(UserError, match=match) as error:
            produce(prepare_preferences, config, tokenizer=tokenizer)
        assert "\n" not in str(error.value)

    bad = records_in(tmp_path / "bad.jsonl", [pair(0), "", pair(1, rejected=pair(1)["chosen"])])
    refused(
        r"^preferences.source: .*bad.jsonl:3 has the same answer .* preferences.max_bad_records \(it is 0\)",
        section(bad),
    )
    broken = records_in(tmp_path / "broken.jsonl", [pair(0), "{"])
    refused(r"^preferences.source: .*broken.jsonl:2 is not JSON", section(broken))
    refused(r"^preferences.source.paths: .*nowhere", section(tmp_path / "nowhere"))
    good = records_in(tmp_path / "good.jsonl", [pair(0), pair(1)])
    refused(
        r"^preferences.test_fraction: 0.01 of 2 pairs .* leaves the test split empty",
        section(good, test_fraction=0.01),
    )
    refused(r"^preferences.source: no pair is left of 2 records \(too_long 2\)", section(good, sequence_length=4))
    plain = tokenizer_in(tmp_path / "plain")
    refused(r"^preferences.template.kind: tokenizer, but .* has no chat template", section(good), plain)
    thinking = tokenizer_in(tmp_path / "thinking", untagged(THINKING))
    lost = records_in(tmp_path / "lost.jsonl", [pair(0, chosen=[turn("assistant", "a</think>b")])])
    refused(r"lost.jsonl:1 .*the chat template changes or drops it", section(lost), thinking)
    with pytest.raises(UserError, match=r"^preferences.source.paths: "):
        section(tmp_path / "nowhere").fingerprint()


def test_sections_refuse_what_means_nothing() -> None:
    documented = {"type": "installed-docs-qa", "distributions": ["click"]}
    for source, values, match in (
        (documented, {"validation_fraction": 0.6, "test_fraction": 0.5}, "leaves nothing to train on"),
        ([documented, documented], {}, "stands there twice"),
        ({"type": "files", "paths": ["a"], "records": {"format": "text", "chosen": "x"}}, {}, "names no field"),
        ({"type": "files", "paths": ["a"], "records": {"format": "completion"}}, {}, "'chat', 'text'"),
    ):
        with pytest.raises(ValueError, match=match):
            section(source, **values)
    assert section(documented).fingerprint() != ""
