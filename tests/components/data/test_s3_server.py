"""A corpus in S3, on a server that checks signatures and rights."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from modelmill.components.core.errors import UserError
from modelmill.components.data.config import CorpusConfig
from modelmill.components.data.corpus import ingest_corpus
from tests.components.data.conftest import Produce
from tests.components.data.test_corpus import everything, sentence
from tests.fakes.s3_server import READER, S3Server

TEXTS = [sentence(number) for number in range(40)]


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two objects below `corpus/`; the step may only read them."""
    s3_server.enter(monkeypatch, READER)
    name, client = s3_server.bucket(), s3_server.client()
    lines = ["".join(json.dumps({"text": text}) + "\n" for text in part) for part in (TEXTS[:20], TEXTS[20:])]
    client.put_object(Bucket=name, Key="corpus/a.jsonl", Body=lines[0])
    client.put_object(Bucket=name, Key="corpus/b ü.jsonl.gz", Body=gzip.compress(lines[1].encode(), mtime=0))
    return name


def config(uri: str) -> CorpusConfig:
    values: dict[str, Any] = {"validation_fraction": 0.2, "test_fraction": 0.2, "min_document_length": 20}
    return CorpusConfig.model_validate({"source": {"type": "s3", "uri": uri}} | values)


def test_a_prefix_is_read_whole(bucket: str, produce: Produce) -> None:
    assert sorted(everything(produce(ingest_corpus, config(f"s3://{bucket}/corpus")))) == sorted(TEXTS)


def test_the_fingerprint_follows_the_objects(bucket: str, s3_server: S3Server) -> None:
    settings, client = config(f"s3://{bucket}/corpus"), s3_server.client()
    first = settings.fingerprint()
    client.put_object(Bucket=bucket, Key="elsewhere/c.txt", Body=b"x")
    body = client.get_object(Bucket=bucket, Key="corpus/a.jsonl")["Body"].read()
    client.put_object(Bucket=bucket, Key="corpus/a.jsonl", Body=body)
    assert settings.fingerprint() == first
    client.put_object(Bucket=bucket, Key="corpus/a.jsonl", Body=body + b"\n")
    assert settings.fingerprint() != first


def test_rights_are_needed(bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    s3_server.enter(monkeypatch, ("nobody", "x"))
    with pytest.raises(UserError, match=rf"^corpus\.source\.uri: s3://{bucket}/corpus: the credentials are refused"):
        config(f"s3://{bucket}/corpus").fingerprint()
