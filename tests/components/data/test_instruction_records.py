"""Records of every form from every source; what is wrong with one is told with its file, line and field."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pydantic import TypeAdapter, ValidationError

from modelmill.components.core.errors import UserError
from modelmill.components.data.conversations import (
    BadRecord,
    Message,
    content_digest,
    prompt_digest,
    read_conversation,
)
from modelmill.components.data.instruction_config import (
    ChatRecords,
    CompletionRecords,
    InstructionsConfig,
    InstructionSource,
)
from modelmill.components.data.instruction_sources import read_source
from tests.components.data.instruction_data import CONVERSATIONS, chat, messages, records_in

CHAT = ChatRecords(format="chat")
RECORDS = [chat(*turns) for turns in CONVERSATIONS.values()]


def read(scratch: Path, **source: Any) -> list[tuple[str, Any]]:
    return list(read_source(TypeAdapter(InstructionSource).validate_python(source), scratch))


def encoded(records: list[dict[str, Any]], kind: str) -> bytes:
    if kind == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(records), sink, row_group_size=2)
        return sink.getvalue().to_pybytes()
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_every_format_gives_the_same_records(tmp_path: Path, kind: str, compression: str) -> None:
    data = encoded(RECORDS, kind)
    data = gzip.compress(data) if compression == ".gz" else zstandard.compress(data) if compression else data
    path = tmp_path / "deep" / f"a.{kind}{compression}"
    path.parent.mkdir()
    path.write_bytes(data)
    (path.parent / "README.md").write_text("What the records are.")
    found = read(tmp_path, type="files", paths=[str(tmp_path)])
    first, step = (f"{path}:1", ":") if kind == "jsonl" else (f"{path} row 0", " row ")
    assert found[0][0] == first
    assert len({place.rpartition(step)[2] for place, _ in found}) == len(RECORDS)
    said = [read_conversation(value, CHAT, None) for _, value in found]
    assert said == [messages(turns) for turns in CONVERSATIONS.values()]
    assert not list(tmp_path.glob("*.parquet"))


def test_blank_lines_count_but_are_no_records(tmp_path: Path) -> None:
    path = records_in(tmp_path / "a.jsonl", ["\ufeff" + json.dumps(RECORDS[0]), "", "{", RECORDS[1]])
    found = read(tmp_path, type="files", paths=[str(path)])
    assert [place for place, _ in found] == [f"{path}:1", f"{path}:3", f"{path}:4"]
    assert isinstance(found[1][1], ValueError)


def test_a_dataset_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "dataset"
    folder.mkdir()
    records_in(folder / "train.jsonl", RECORDS)
    found = read(tmp_path, type="huggingface", name=str(folder))
    assert [read_conversation(value, CHAT, None) for _, value in found] == list(map(messages, CONVERSATIONS.values()))
    assert found[1][0] == f"{folder} row 1"
    with pytest.raises(UserError, match=r"^instructions\.source\.name: .* cannot be read \(.*dev"):
        read(tmp_path, type="huggingface", name=str(folder), split="dev")


def test_a_bucket(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=server)
    client.create_bucket(Bucket="instruction-data")
    client.put_object(Bucket="instruction-data", Key="chats/a.jsonl.gz", Body=gzip.compress(encoded(RECORDS, "jsonl")))
    source = {"type": "s3", "uri": "s3://instruction-data/chats", "endpoint_url": server}
    found = read(tmp_path, **source)
    assert [value for _, value in found] == RECORDS
    assert found[2][0] == "s3://instruction-data/chats/a.jsonl.gz:3"
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"^instructions\.source\.uri: .* there is no such bucket"):
        read(tmp_path, **source | {"uri": "s3://absent-bucket/a"})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"text", r"a\.txt holds text but no records; give jsonl or parquet"),
        ("a.jsonl", b'{"a": 1}\n{"b": "\xff"}', r"a\.jsonl is not UTF-8 at byte 16"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 999, mtime=0)[:-9], r"a\.jsonl\.gz ends in the middle"),
        ("a.parquet", b"PAR1", r"a\.parquet is not a whole Parquet file"),
        ("a.csv", b"a,b", r"has a format that is not read"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^instructions\.source.*{words}"):
        read(tmp_path, type="files", paths=[str(tmp_path / name)])


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("record", "reason", "words"),
    [
        (ValueError("Expecting value"), "not_json", r"is not JSON \(Expecting value\)"),
        (["a"], "wrong_type", "is a list, not an object"),
        ({"text": "a"}, "missing_field", "has no field 'messages' but 'text'"),
        ({"messages": "a"}, "wrong_type", "messages is str, not a list of messages"),
        ({"messages": None}, "wrong_type", "messages is NoneType"),
        ({"messages": []}, "no_messages", "messages is an empty list"),
        ({"messages": [USER, "a"]}, "wrong_type", r"messages\[1\] is str, not an object"),
        ({"messages": [USER, {"content": "a"}]}, "missing_field", r"messages\[1\] has no field 'role' but 'content'"),
        ({"messages": [{"role": 1, "content": "a"}]}, "wrong_type", r"messages\[0\]\.role is int, not text"),
        (
            {"messages": [USER, {"role": "bot", "content": "a"}]},
            "unknown_role",
            r"messages\[1\]\.role: 'bot' is none of system, user, assistant, tool",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            "wrong_type",
            r"messages\[1\]\.content is null, not text",
        ),
        (
            {"messages": [USER, ANSWER | {"tool_calls": [{"name": "f"}]}]},
            "tool_calls",
            r"messages\[1\] calls tools; only what stands in content",
        ),
        ({"messages": [{"role": "user", "content": " \n"}]}, "empty_content", r"messages\[0\]\.content is empty"),
        ({"messages": [USER]}, "no_assistant", "has no turn of the assistant but only user"),
        ({"messages": [ANSWER, USER, ANSWER]}, "no_prompt", "has no turn of the user before"),
        ({"messages": [USER, ANSWER, USER]}, "assistant_not_last", "ends with a turn of the user"),
        (
            {"messages": [USER, {"role": "system", "content": "s"}, ANSWER]},
            "system_not_first",
            "has a system message as number 2",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "not_unicode", r"messages\[0\]\.content holds half"),
    ],
)
def test_what_is_wrong_with_a_chat_record(record: Any, reason: str, words: str) -> None:
    with pytest.raises(BadRecord, match=words) as caught:
        read_conversation(record, CHAT, None)
    assert caught.value.reason == reason


def test_other_names_of_fields_and_roles() -> None:
    records = ChatRecords(
        format="chat",
        messages="conversations",
        role="from",
        content="value",
        roles={"human": "user", "gpt": "assistant"},
    )
    record = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": " b\n"}]}
    assert read_conversation(record, records, None) == [Message("user", "a"), Message("assistant", " b\n")]
    record["conversations"][1]["from"] = "bing"
    with pytest.raises(BadRecord, match=r"conversations\[1\]\.from: 'bing' is none of system, .*, human, gpt"):
        read_conversation(record, records, None)


@pytest.mark.parametrize(
    ("names", "record", "said"),
    [
        ({}, {"prompt": " p ", "completion": "c\n"}, [("user", "p"), ("assistant", "c")]),
        (
            {"prompt": "{instruction}\n\n{input}", "completion": "{output}"},
            {"instruction": "Add.", "input": "1 and 2", "output": "3"},
            [("user", "Add.\n\n1 and 2"), ("assistant", "3")],
        ),
        (
            {"prompt": "{instruction}\n\n{input}", "completion": "{output}"},
            {"instruction": "Say {hi}.", "input": None, "output": "hi"},
            [("user", "Say {hi}."), ("assistant", "hi")],
        ),
        (
            {"prompt": "{Question}", "completion": "<think>{Complex CoT}</think>{{x}}{Answer}", "system": "{s}"},
            {"Question": "Why?", "Complex CoT": "Well.", "Answer": "Because.", "s": "Be."},
            [("system", "Be."), ("user", "Why?"), ("assistant", "<think>Well.</think>{x}Because.")],
        ),
        ({"system": "{s}"}, {"prompt": "p", "completion": "c", "s": ""}, [("user", "p"), ("assistant", "c")]),
    ],
)
def test_prompts_and_completions(names: dict[str, str], record: dict[str, Any], said: list[tuple[str, str]]) -> None:
    assert read_conversation(record, CompletionRecords(format="completion", **names), None) == messages(said)


@pytest.mark.parametrize(
    ("record", "reason", "words"),
    [
        ({"prompt": "p"}, "missing_field", "has no field 'completion' but 'prompt'"),
        ({"prompt": "p", "completion": None}, "empty_content", r"completion \('\{completion\}'\) is empty"),
        ({"prompt": "p", "completion": 3}, "wrong_type", "completion is int, not text"),
        ({"prompt": [USER], "completion": "c"}, "wrong_type", "prompt is list, not text"),
    ],
)
def test_what_is_wrong_with_a_completion(record: Any, reason: str, words: str) -> None:
    with pytest.raises(BadRecord, match=words) as caught:
        read_conversation(record, CompletionRecords(format="completion"), None)
    assert caught.value.reason == reason


def test_a_system_message_for_those_without_one() -> None:
    assert read_conversation(chat(*CONVERSATIONS["single"]), CHAT, "S")[0] == Message("system", "S")
    assert read_conversation(chat(*CONVERSATIONS["system"]), CHAT, "S")[0] == Message("system", "Be brief.")


def test_digests_tell_conversations_and_prompts_apart() -> None:
    one = messages([("system", "S"), ("user", "q"), ("assistant", "a")])
    other = messages([("user", "q"), ("assistant", "b"), ("user", "r"), ("assistant", "c")])
    assert prompt_digest(one) == prompt_digest(other) != prompt_digest(messages([("user", "r"), ("assistant", "a")]))
    assert content_digest(one) != content_digest(other)
    shifted = [messages([("user", 'a"]["b'), ("assistant", "c")]), messages([("user", "a"), ("assistant", 'b"]["c')])]
    assert len({content_digest(given) for given in shifted}) == 2


FILES = {"type": "files", "paths": ["a.jsonl"]}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"source": []}, "at least 1 item"),
        ({"source": {**FILES, "records": {"format": "completion", "prompt": "p"}}}, "names no field of the record"),
        ({"source": {**FILES, "records": {"format": "completion", "prompt": "{a!r}"}}}, "not a plain name in braces"),
        ({"source": {**FILES, "records": {"format": "completion", "prompt": "{a"}}}, "prompt"),
        ({"source": {**FILES, "records": {"format": "chat", "roles": {"bot": "robot"}}}}, "roles.bot"),
        ({"source": FILES, "template": {"kind": "prompt", "text": "{prompt}{completion}."}}, "ends with its only"),
        ({"source": FILES, "template": {"kind": "prompt", "text": "{completion}"}}, r"needs \{prompt\} once"),
        ({"source": FILES, "template": {"kind": "prompt", "text": "{q}{completion}"}}, r"\{q\} is unknown"),
        ({"source": FILES, "template": {"kind": "jinja"}}, "give exactly one of them"),
        ({"source": FILES, "validation_fraction": 0.6, "test_fraction": 0.4}, "leaves nothing to train on"),
        ({"source": [{"type": "installed-docs-qa"}] * 2}, "stands there twice"),
        ({"source": {"type": "installed-docs-qa", "max_answer_length": 5}}, "below min_answer_length 20"),
        ({"source": {"type": "installed-docs-qa", "distributions": ["modelmill"]}}, "not a source of text"),
    ],
)
def test_sections_that_make_no_sense(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        InstructionsConfig.model_validate(values)


def test_fingerprint_follows_files_and_template(tmp_path: Path) -> None:
    path = records_in(tmp_path / "a.jsonl", RECORDS)
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    template = {"kind": "jinja", "path": str(tmp_path / "chat.jinja")}
    source = {"type": "files", "paths": [str(path)]}
    section = InstructionsConfig.model_validate({"source": source, "template": template})
    first = section.fingerprint()
    assert section.fingerprint() == first
    records_in(path, RECORDS[:1])
    second = section.fingerprint()
    (tmp_path / "chat.jinja").write_text("{{ messages[0] }}")
    assert len({first, second, section.fingerprint()}) == 3
    (tmp_path / "chat.jinja").unlink()
    with pytest.raises(UserError, match=r"instructions\.template\.path: .* is not a file"):
        section.fingerprint()
    with pytest.raises(UserError, match=r"instructions\.source\.paths: absent does not exist"):
        InstructionsConfig.model_validate({"source": source | {"paths": ["absent"]}}).fingerprint()
