"""S3 as a source, against a real HTTP server that speaks S3."""

from __future__ import annotations

import gzip
import json
from typing import Any

import boto3
import pytest

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.data import s3
from modelmill.components.data.config import CorpusConfig, S3Source
from modelmill.components.data.corpus import ingest_corpus
from tests.components.data.conftest import Produce
from tests.components.data.test_corpus import everything, sentence

BUCKET = "modelmill-test-data"
TEXTS = [sentence(number) for number in range(60)]


@pytest.fixture
def client(server: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bucket with a folder of three formats; credentials in the environment, as boto3 looks for them."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
    }.items():
        monkeypatch.setenv(name, value)
    found = boto3.client("s3", endpoint_url=server)
    found.create_bucket(Bucket=BUCKET)
    lines = ["".join(json.dumps({"text": text}) + "\n" for text in part) for part in (TEXTS[:30], TEXTS[30:59])]
    found.put_object(Bucket=BUCKET, Key="corpus/a.jsonl", Body=lines[0])
    found.put_object(Bucket=BUCKET, Key="corpus/deep/../b.jsonl.gz", Body=gzip.compress(lines[1].encode()))
    found.put_object(Bucket=BUCKET, Key="corpus/c ü.txt", Body=TEXTS[59])
    found.put_object(Bucket=BUCKET, Key="corpus/image.png", Body=b"\x89PNG")
    found.put_object(Bucket=BUCKET, Key="corpus/", Body=b"")
    found.put_object(Bucket=BUCKET, Key="corpus-other/d.txt", Body=sentence(99))
    yield found
    for entry in found.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        found.delete_object(Bucket=BUCKET, Key=entry["Key"])
    found.delete_bucket(Bucket=BUCKET)


def config(server: str, uri: str, **values: Any) -> CorpusConfig:
    held_out = {"validation_fraction": 0.2, "test_fraction": 0.2, "min_document_length": 20}
    return CorpusConfig.model_validate(
        {"source": {"type": "s3", "uri": uri, "endpoint_url": server}} | held_out | values
    )


def ingest(produce: Produce, server: str, uri: str) -> Manifest:
    return produce(ingest_corpus, config(server, uri))


@pytest.mark.usefixtures("client")
def test_a_prefix_is_read_whole_and_nothing_beside_it(server: str, produce: Produce, tmp_path: Any) -> None:
    made = ingest(produce, server, f"s3://{BUCKET}/corpus")
    assert sorted(everything(made)) == sorted(TEXTS)
    assert made.digest == ingest(produce, server, f"s3://{BUCKET}/corpus/").digest
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix not in (".arrow", ".json")]
    assert not [path for path in left if "home" not in path.parts]  # no object of the bucket is kept


@pytest.mark.usefixtures("client")
def test_one_object_is_read(server: str, produce: Produce) -> None:
    assert sorted(everything(ingest(produce, server, f"s3://{BUCKET}/corpus/a.jsonl"))) == sorted(TEXTS[:30])


def test_fingerprint_follows_keys_and_content(server: str, client: Any) -> None:
    settings = config(server, f"s3://{BUCKET}/corpus")
    first = settings.fingerprint()
    assert settings.fingerprint() == first
    client.put_object(Bucket=BUCKET, Key="corpus-other/e.txt", Body="elsewhere")
    assert settings.fingerprint() == first
    client.put_object(Bucket=BUCKET, Key="corpus/a.jsonl", Body="x")
    second = settings.fingerprint()
    client.put_object(Bucket=BUCKET, Key="corpus/z.txt", Body="x")
    assert len({first, second, settings.fingerprint()}) == 3


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3://modelmill-absent-bucket/a", "there is no such bucket"),
        (f"s3://{BUCKET}/absent.txt", "names no object"),
        (f"s3://{BUCKET}/corp", "names no object"),
        (f"s3://{BUCKET}/corpus/image.png", "holds no object that can be read"),
    ],
)
def test_what_is_missing_is_named(server: str, uri: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        config(server, uri).fingerprint()
    assert str(caught.value).startswith(f"corpus.source.uri: {uri}")


@pytest.mark.usefixtures("client")
def test_no_credentials(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match=r"needs AWS credentials .* set AWS_PROFILE"):
        config(server, f"s3://{BUCKET}/corpus").fingerprint()


@pytest.mark.usefixtures("client")
def test_no_server() -> None:
    with pytest.raises(UserError, match=r"cannot be reached at http://127\.0\.0\.1:9"):
        config("http://127.0.0.1:9", f"s3://{BUCKET}/corpus").fingerprint()


def test_an_object_that_changes_between_listing_and_reading(server: str, client: Any, tmp_path: Any) -> None:
    [source] = config(server, f"s3://{BUCKET}/corpus/a.jsonl").source
    assert isinstance(source, S3Source)
    [entry] = s3.list_objects(source)
    client.put_object(Bucket=BUCKET, Key="corpus/a.jsonl", Body="other content")
    with pytest.raises(UserError, match=r"changed while it was read|arrived; run again"):
        s3.download(source, entry, tmp_path / "object")
    client.delete_object(Bucket=BUCKET, Key="corpus/a.jsonl")
    with pytest.raises(UserError, match="the object is gone"):
        s3.download(source, entry, tmp_path / "object")


def test_damage_is_named_by_key(server: str, client: Any, produce: Produce) -> None:
    client.put_object(Bucket=BUCKET, Key="corpus/bad.txt", Body=b"a" * 40 + b"\xff")
    with pytest.raises(UserError, match=rf"s3://{BUCKET}/corpus/bad\.txt is not UTF-8 at byte 40"):
        ingest(produce, server, f"s3://{BUCKET}/corpus")
