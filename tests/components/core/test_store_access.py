"""Who may use a store in S3, and what is said to those who may not."""

from __future__ import annotations

import re

import pytest

from tests.components.core.stored_steps import CALLS, Bucket, refused, run, write
from tests.fakes.s3_server import FULL, READER, WRITER, S3Server


@pytest.mark.parametrize(
    ("identity", "store", "words"),
    [
        (WRITER, "s3://modelmill-absent/x", r"MODELMILL_STORE: s3://modelmill-absent/x/\S+: there is no such bucket"),
        (READER, "", r"MODELMILL_STORE: s3://\S+/write/\.writable: access is denied; allow s3:PutObject"),
        (("nobody", "x"), "", r"MODELMILL_STORE: s3://\S+: the credentials are refused \(InvalidAccessKeyId\)"),
        ((FULL[0], "x"), "", r"MODELMILL_STORE: s3://\S+: the credentials are refused \(SignatureDoesNotMatch\)"),
        (FULL, "s3:/x", r"MODELMILL_STORE: 's3:/x' is not an S3 URI; write s3://bucket/key"),
        (FULL, "/somewhere", r"MODELMILL_STORE: '/somewhere' is not an S3 URI"),
    ],
    ids=["no-bucket", "read-only", "unknown-key", "wrong-secret", "no-uri", "a-path"],
)
def test_a_store_that_cannot_be_used_is_named_before_anything_is_computed(
    bucket: Bucket,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    identity: tuple[str, str],
    store: str,
    words: str,
) -> None:
    bucket.server.enter(monkeypatch, identity)
    if store:
        monkeypatch.setenv("MODELMILL_STORE", store)
    assert re.match(words, refused(capsys))
    assert CALLS == []


def test_a_reader_reuses_what_others_made(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run(write)
    bucket.server.enter(monkeypatch, READER)
    bucket.use("elsewhere")
    assert run(write) == made
    assert made.path("deep/text.txt").read_text() == "hello"


def test_no_credentials_at_all(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "needs AWS credentials (Unable to locate credentials); set AWS_PROFILE" in refused(capsys)


def test_the_stores_own_endpoint(
    bucket: Bucket, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An S3-compatible store beside AWS: the variable counts for outputs, also for reading them."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    assert "cannot be reached at http://127.0.0.1:9" in refused(capsys)
    monkeypatch.setenv("MODELMILL_STORE_ENDPOINT", s3_server.endpoint)
    made = run(write)
    bucket.use("elsewhere")
    assert made.path("deep/text.txt").read_text() == "hello"
