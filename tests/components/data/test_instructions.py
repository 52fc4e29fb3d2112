"""The step as a whole: records in, rows out, everything counted, nothing in two splits."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import run_step, section
from modelmill.components.data import instructions, preview
from modelmill.components.data.chat_template import open_template
from modelmill.components.data.conversations import Message
from modelmill.components.data.documents import SPLITS
from modelmill.components.data.instruction_prompts import read_prompts
from modelmill.components.data.instruction_rows import (
    IGNORE,
    InstructionSource,
    open_instructions,
    read_conversations,
)
from modelmill.components.data.instructions import prepare_instructions
from modelmill.components.data.tokenizer_files import load_tokenizer, span_mask
from tests.components.data.conftest import Produce
from tests.components.data.instruction_data import CHATML, chat, config, records_in, tokenizer_in, untagged


@pytest.fixture
def chatml(tmp_path: Path) -> Manifest:
    return tokenizer_in(tmp_path / "tokenizer", untagged(CHATML))


def question(number: int, answer: str = "") -> dict[str, Any]:
    said = answer or f"It is {number + number}." * (1 + number % 3)
    return chat(("user", f"What is {number} + {number}?"), ("assistant", said))


def kept(made: Manifest) -> dict[str, list[dict[str, Any]]]:
    return {split: list(read_conversations(made, split)) for split in SPLITS}


def test_rows_hold_every_conversation_as_the_template_writes_it(
    tmp_path: Path, chatml: Manifest, produce: Produce
) -> None:
    path = records_in(tmp_path / "a.jsonl", [question(number) for number in range(120)])
    made = produce(prepare_instructions, config(path, validation_fraction=0.2, test_fraction=0.2), tokenizer=chatml)
    files = load_tokenizer(chatml)
    template = open_template(made.metadata["template"], files)
    for split in SPLITS:
        rows, said = open_instructions(made, split), list(read_conversations(made, split))
        assert len(said) == len(rows.places) == made.counts[f"{split}_conversations"] > 5
        for record, (row, start, size, targets) in zip(said, rows.places.tolist(), strict=True):
            rendered = template.render([Message(**message) for message in record["messages"]])
            encoded = files.encoder.encode(rendered.text, add_special_tokens=False)
            part = row, slice(start, start + size)
            assert rows.tokens[part].tolist() == encoded.ids
            assert rows.loss_mask[part].astype(bool).tolist() == span_mask(encoded, rendered.spans).tolist()
            assert targets == rows.loss_mask[part].sum() > 0
        assert made.counts[f"{split}_tokens"] == rows.places[:, 2].sum()
        assert (
            made.counts[f"{split}_targets"] == rows.targets.sum() == (rows.take(slice(None)).targets != IGNORE).sum()
        )
        assert isinstance(rows.tokens, np.memmap)
    assert made.counts["read_records"] == 120 == sum(made.counts[f"{split}_conversations"] for split in SPLITS)
    assert made.counts["sequence_length"] == 64
    assert made.metadata["pad_token_id"] == 2
    assert made.metadata["eos_token_id"] == 1
    assert made.metrics["fill"] == made.counts["train_tokens"] / made.counts["train_rows"] / 65
    assert InstructionSource(open_instructions(made, "train"), 0, 2).batch(0).tokens.shape == (2, 64)


def test_no_prompt_is_in_two_splits_and_no_conversation_twice(
    tmp_path: Path, chatml: Manifest, produce: Produce
) -> None:
    """A question with several answers stays together; its split does not depend on what surrounds it."""
    records = [question(n, answer) for answer in ("One.", "Two.", "One.") for n in range(60)]
    path = records_in(tmp_path / "a.jsonl", records)
    shares = {"validation_fraction": 0.3, "test_fraction": 0.3}
    made = produce(prepare_instructions, config(path, **shares), tokenizer=chatml)
    said = kept(made)
    prompts = {split: {record["messages"][0]["content"] for record in said[split]} for split in SPLITS}
    assert sum(map(len, prompts.values())) == len(set().union(*prompts.values())) == 60
    assert sum(map(len, said.values())) == 120 == len({record["id"] for split in SPLITS for record in said[split]})
    assert made.counts["dropped_duplicate"] == 60
    assert min(map(len, prompts.values())) > 8
    half = records_in(tmp_path / "b.jsonl", records[30:90])
    again = kept(produce(prepare_instructions, config(half, **shares), tokenizer=chatml))
    for split in SPLITS:
        assert {record["messages"][0]["content"] for record in again[split]} <= prompts[split]
    reseeded = kept(produce(prepare_instructions, config(path, **shares, seed=1), tokenizer=chatml))
    assert {record["messages"][0]["content"] for record in reseeded["test"]} != prompts["test"]


def test_sources_with_a_split_of_their_own(tmp_path: Path, chatml: Manifest, produce: Produce) -> None:
    """What is held out by name is not learnt, wherever else it stands."""
    train = records_in(tmp_path / "train.jsonl", [question(n) for n in range(40)])
    test = records_in(tmp_path / "test.jsonl", [question(n, "Held out.") for n in range(30, 45)])
    sources = [
        {"type": "files", "paths": [str(train)], "into": "train"},
        {"type": "files", "paths": [str(test)], "into": "test"},
    ]
    made = produce(prepare_instructions, config(sources), tokenizer=chatml)
    said = kept(made)
    assert [len(said[split]) for split in SPLITS] == [30, 0, 15]
    assert {record["source"] for record in said["test"]} == {1}
    assert made.counts["dropped_in_other_split"] == 10
    report = json.loads(made.path("instructions.json").read_text())
    assert [source["dropped"] for source in report["sources"]] == [{"in_other_split": 10}, {}]
    assert open_instructions(made, "validation").take(slice(None)).tokens.shape == (0, 64)


def test_equal_inputs_give_equal_bytes(
    tmp_path: Path, chatml: Manifest, produce: Produce, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = records_in(tmp_path / "a.jsonl", [question(number) for number in range(50)])
    chosen = config(path, validation_fraction=0.2, test_fraction=0.2)
    one = produce(prepare_instructions, chosen, tokenizer=chatml)
    monkeypatch.setattr(instructions, "BATCH_CHARACTERS", 100)
    moved = path.rename(tmp_path / "moved.jsonl")
    two = produce(prepare_instructions, config(moved, validation_fraction=0.2, test_fraction=0.2), tokenizer=chatml)
    assert one.digest == two.digest
    other = produce(
        prepare_instructions, config(moved, validation_fraction=0.2, test_fraction=0.2, seed=1), tokenizer=chatml
    )
    assert other.digest != one.digest


@pytest.mark.parametrize("allowed", [0, 2, 3])
def test_bad_records(
    tmp_path: Path, chatml: Manifest, produce: Produce, allowed: int, caplog: pytest.LogCaptureFixture
) -> None:
    good = [question(number) for number in range(4)]
    bad = ["{", chat(("user", "Hi")), chat(("user", "a <|im_end|>"), ("assistant", "b"))]
    path = records_in(tmp_path / "a.jsonl", [*good[:2], bad[0], good[2], bad[1], bad[2], good[3]])
    chosen = config(path, max_bad_records=allowed)
    if allowed == 3:
        made = produce(prepare_instructions, chosen, tokenizer=chatml)
        reasons = {name: made.counts[f"dropped_{name}"] for name in ("not_json", "no_assistant", "special_token")}
        assert reasons == {"not_json": 1, "no_assistant": 1, "special_token": 1}
        assert (made.counts["read_records"], made.counts["train_conversations"]) == (7, 4)
        assert f"dropped {path}:5 has no turn of the assistant" in caplog.text
        return
    line, words = (3, "is not JSON") if allowed == 0 else (6, "spells the special token")
    with pytest.raises(UserError, match=rf"^instructions\.source: {path}:{line} .*{words}") as caught:
        produce(prepare_instructions, chosen, tokenizer=chatml)
    assert f"raise instructions.max_bad_records (it is {allowed})" in str(caught.value)
    assert ("3 bad records: no_assistant 1, not_json 1, special_token 1" in str(caught.value)) == (allowed == 2)


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_conversations_longer_than_a_row(tmp_path: Path, chatml: Manifest, produce: Produce, too_long: str) -> None:
    fits, cut = chat(("user", "a"), ("assistant", "b")), chat(("user", "a"), ("assistant", "z" * 90))
    unlearnt = chat(("user", "q" * 90), ("assistant", "b"))
    path = records_in(tmp_path / "a.jsonl", [fits, cut, unlearnt])
    made = produce(prepare_instructions, config(path, too_long=too_long), tokenizer=chatml)
    counts = {name: made.counts[name] for name in ("train_conversations", "truncated", "dropped_too_long")}
    if too_long == "drop":
        assert counts == {"train_conversations": 1, "truncated": 0, "dropped_too_long": 2}
        return
    assert counts == {"train_conversations": 2, "truncated": 1, "dropped_too_long": 0}
    assert made.counts["dropped_unlearnt"] == 1
    rows = open_instructions(made, "train")
    assert rows.places[1, 2] == 65
    assert rows.loss_mask[rows.places[1, 0]].sum() == rows.places[1, 3] > 0


def test_a_conversation_that_just_fits_is_whole(tmp_path: Path, chatml: Manifest, produce: Produce) -> None:
    files = load_tokenizer(chatml)
    said = chat(("user", "What is the capital?"), ("assistant", "Paris."))
    text = (
        open_template({"kind": "chat", "text": untagged(CHATML), "variables": {}}, files)
        .render([Message(**message) for message in said["messages"]])
        .text
    )
    size = len(files.encoder.encode(text).ids)
    path = records_in(tmp_path / "a.jsonl", [said])
    for length, dropped in ((size - 1, 0), (size - 2, 1)):
        chosen = config(path, sequence_length=length, too_long="drop")
        if dropped:
            with pytest.raises(UserError, match=r"no conversation is left of 1 records \(too_long 1\)"):
                produce(prepare_instructions, chosen, tokenizer=chatml)
        else:
            assert produce(prepare_instructions, chosen, tokenizer=chatml).metrics["fill"] == 1.0


def test_everything_can_be_learnt(tmp_path: Path, chatml: Manifest, produce: Produce) -> None:
    path = records_in(tmp_path / "a.jsonl", [question(number) for number in range(5)])
    made = produce(prepare_instructions, config(path, train_on="all"), tokenizer=chatml)
    assert made.counts["train_targets"] == made.counts["train_tokens"] - made.counts["train_conversations"]


@pytest.mark.parametrize("kind", ["chat", "prompt"])
def test_prompts_to_generate_from_are_those_of_training(
    tmp_path: Path, chatml: Manifest, produce: Produce, kind: str
) -> None:
    """What a model is asked stands before the last answer's first target, token by token."""
    said = [question(number) for number in range(20)]
    if kind == "chat":
        for record in said[::2]:
            record["messages"] = [*record["messages"], *question(7)["messages"]]
    path = records_in(tmp_path / "a.jsonl", said)
    text = {} if kind == "chat" else {"template": {"kind": "prompt", "text": "Q: {prompt}\nA: {completion}"}}
    made = produce(prepare_instructions, config(path, sequence_length=200, **text), tokenizer=chatml)
    rows, prompts = open_instructions(made, "train"), list(read_prompts(made, chatml, "train"))
    assert len(prompts) == 20
    for prompt, record, (row, start, size, _) in zip(
        prompts, read_conversations(made, "train"), rows.places.tolist(), strict=True
    ):
        assert (prompt.id, prompt.reference) == (record["id"], record["messages"][-1]["content"])
        ids, mask = rows.tokens[row, start : start + size], rows.loss_mask[row, start : start + size]
        assert ids[: len(prompt.tokens)].tolist() == list(prompt.tokens)
        assert mask[len(prompt.tokens) :].all()
        assert not mask[len(prompt.tokens) - 1]


def test_a_prompt_text_with_the_answer_kept(tmp_path: Path, produce: Produce) -> None:
    """Instruction, question, reasoning and answer of a medical data set, with the base model's start token."""
    record = {"Question": " Why? ", "Complex_CoT": "Well.", "Response": "Because."}
    path = records_in(tmp_path / "a.jsonl", [record])
    records = {"format": "completion", "prompt": "{Question}", "completion": "{Complex_CoT}\n\n{Response}"}
    source = {"type": "files", "paths": [str(path)], "records": records}
    chosen = config(source, template={"kind": "prompt"}, system="You are a doctor.", sequence_length=600)
    made = produce(prepare_instructions, chosen, tokenizer=tokenizer_in(tmp_path / "t", bos=True))
    rows, files = open_instructions(made, "train"), load_tokenizer(tokenizer_in(tmp_path / "u", bos=True))
    [(row, start, size, targets)] = rows.places.tolist()
    ids = rows.tokens[row, start : start + size]
    assert ids[0] == 0
    assert ids[-1] == 1
    learnt = files.encoder.decode(ids[size - targets :].tolist(), skip_special_tokens=False)
    assert learnt == "Well.\n\nBecause.</s>"
    text = files.encoder.decode(ids.tolist(), skip_special_tokens=False)
    assert "### Instruction:\nYou are a doctor.\n\n### Question:\nWhy?\n\n### Response:\nWell." in text


def test_a_prompt_text_without_its_system_message(tmp_path: Path, chatml: Manifest, produce: Produce) -> None:
    path = records_in(tmp_path / "a.jsonl", [question(1)])
    with pytest.raises(UserError, match=r"a\.jsonl:1 has no system message .*; set instructions\.system"):
        produce(prepare_instructions, config(path, template={"kind": "prompt"}), tokenizer=chatml)


def test_a_tokenizer_without_a_template(tmp_path: Path, produce: Produce) -> None:
    path = records_in(tmp_path / "a.jsonl", [question(1)])
    bare = tokenizer_in(tmp_path / "t")
    with pytest.raises(UserError, match=r"has no chat template; give one with template\.kind jinja, or a"):
        produce(prepare_instructions, config(path), tokenizer=bare)
    nothing = Manifest.describe(records_in(tmp_path / "empty.jsonl", []).parent / "t", kind="x")
    nothing.files.clear()
    with pytest.raises(UserError, match=r"holds no tokenizer\.json; give a tokenizer or an exported model"):
        produce(prepare_instructions, config(path), tokenizer=nothing)


@pytest.mark.parametrize(
    ("values", "records", "words"),
    [
        ({}, [], r"instructions\.source: no conversation is left of 0 records \(none dropped\)"),
        (
            {"validation_fraction": 0.001},
            [question(1)],
            r"instructions\.validation_fraction: 0\.001 of 1 conversations .* leaves the validation split empty",
        ),
        (
            {"test_fraction": 0.999},
            [question(1)],
            r"source: the rest of 1 conversations .* leaves the train split empty",
        ),
    ],
)
def test_empty_splits(
    tmp_path: Path, chatml: Manifest, produce: Produce, values: dict[str, Any], records: list[Any], words: str
) -> None:
    path = records_in(tmp_path / "a.jsonl", records)
    with pytest.raises(UserError, match=words):
        produce(prepare_instructions, config(path, **values), tokenizer=chatml)


def test_a_split_given_by_name_may_not_be_empty(tmp_path: Path, chatml: Manifest, produce: Produce) -> None:
    path, empty = records_in(tmp_path / "a.jsonl", [question(1)]), records_in(tmp_path / "b.jsonl", [])
    sources = [
        {"type": "files", "paths": [str(path)]},
        {"type": "files", "paths": [str(empty)], "into": "validation"},
    ]
    with pytest.raises(UserError, match="leaves the validation split empty"):
        produce(prepare_instructions, config(sources), tokenizer=chatml)


def test_turns_that_nothing_ends_are_warned_of(
    tmp_path: Path, produce: Produce, caplog: pytest.LogCaptureFixture
) -> None:
    open_ended = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    path = records_in(tmp_path / "a.jsonl", [question(number) for number in range(3)])
    produce(prepare_instructions, config(path), tokenizer=tokenizer_in(tmp_path / "t", open_ended))
    assert "3 conversations do not end in a special token" in caplog.text


def test_the_preview_shows_what_the_model_sees(
    tmp_path: Path, chatml: Manifest, produce: Produce, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    said = [chat(("user", f"{n} <b> 漢字"), ("assistant", f"No {n}.\nEnd 🜁.")) for n in range(5)]
    path = records_in(tmp_path / "a.jsonl", said)
    made = produce(prepare_instructions, config(path, preview_conversations=2), tokenizer=chatml)
    text = made.path("preview.txt").read_text()
    assert text.count("conversation") == 2
    assert (
        "  masked | <|im_start|>user↵\n  masked | 0 <b> 漢字<|im_end|>↵\n  masked | <|im_start|>assistant↵\n"
        "  learnt | No 0.↵\n  learnt | End 🜁.<|im_end|>↵\n"
    ) in text
    assert "learnt | No 0.↵" in caplog.text
    page = made.path("preview.html").read_text()
    assert "&lt;</span>" in page
    assert not set(re.findall(r"<(?!/?(?:span|pre|h2|html)\b)", page.partition("<pre>")[2]))
    assert page.count('<span class="learnt" title=') == 2 * open_instructions(made, "train").places[0, 3]


def test_the_preview_in_a_terminal(
    tmp_path: Path, chatml: Manifest, produce: Produce, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    path = records_in(tmp_path / "a.jsonl", [question(1, "Two [/bold].")])
    produce(prepare_instructions, config(path), tokenizer=chatml)
    shown = capsys.readouterr().err
    assert "\x1b[32mTwo [/bold].<|im_end|>" in shown
    assert "\x1b[2m<|im_start|>user" in shown


def test_tokens_in_their_context() -> None:
    """Parts of a character are shown where it is complete, and together the parts are the text."""
    pieces = {0: b"a", 1: b"\xe6", 2: b"\xbc\xa2", 3: b" b", 4: b"\xf0"}
    shown = preview._texts([0, 1, 2, 3, 4], lambda ids: b"".join(pieces[i] for i in ids).decode("utf-8", "replace"))
    assert shown == ["a", "", "漢", " b", "\ufffd"]


def test_through_run_step(tmp_path: Path, chatml: Manifest) -> None:
    """As a pipeline runs it: reused the second time, and a mistake is one line and exit code 2."""
    path = records_in(tmp_path / "a.jsonl", [question(number) for number in range(10)])
    chosen = config(path)
    chatml.write(tmp_path / "tokenizer.json")
    made = []
    for number in range(2):
        text = section("prepare_instructions", chosen, prepare_instructions, chosen.fingerprint())
        out = str(tmp_path / f"out{number}.json")
        run_step(prepare_instructions, text, {"tokenizer": str(tmp_path / "tokenizer.json")}, {"manifest": out})
        made.append(Manifest.read(out))
    assert made[0].created == made[1].created
    assert made[0].kind == "instructions"
    assert all(type(count) is int for count in made[0].counts.values())
    records_in(path, ["{"])
    text = section("prepare_instructions", chosen, prepare_instructions, chosen.fingerprint())
    with pytest.raises(SystemExit) as caught:
        run_step(prepare_instructions, text, {"tokenizer": str(tmp_path / "tokenizer.json")}, {})
    assert caught.value.code == 2


def test_damage_is_found_when_rows_are_opened(tmp_path: Path, chatml: Manifest, produce: Produce) -> None:
    path = records_in(tmp_path / "a.jsonl", [question(number) for number in range(10)])
    made = produce(prepare_instructions, config(path), tokenizer=chatml)
    with pytest.raises(UserError, match=r"no file 'dev\.tokens\.npy'"):
        open_instructions(made, "dev")
    wrong = made.model_copy(update={"counts": made.counts | {"sequence_length": 63}})
    with pytest.raises(UserError, match="run prepare_instructions again"):
        open_instructions(wrong, "train")
    file = Path(made.uri) / "train.loss_mask.npy"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train\.loss_mask\.npy has .* bytes, .* were written"):
        open_instructions(made, "train")
