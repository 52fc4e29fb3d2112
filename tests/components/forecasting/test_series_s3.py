"""Series in S3, on a server that checks signatures and rights: csv and parquet, state, and refusals."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable

import pytest

from modelmill.components.core.errors import UserError
from modelmill.components.forecasting.series import prepare_series
from modelmill.components.forecasting.series_config import SeriesConfig
from modelmill.components.forecasting.series_table import open_series
from tests.components.forecasting.conftest import Produce
from tests.components.forecasting.tables import long
from tests.fakes.s3_server import READER, S3Server

Put = Callable[..., str]


@pytest.fixture
def put(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Store an object in a new bucket; gives the bucket's name. The step itself may only read."""
    s3_server.enter(monkeypatch, READER)
    bucket = s3_server.bucket()

    def store(key: str, content: bytes) -> str:
        s3_server.client().put_object(Bucket=bucket, Key=key, Body=content)
        return bucket

    return store


def settings(uri: str, **source: str) -> SeriesConfig:
    return SeriesConfig.model_validate(
        {"source": {"type": "s3", "uri": uri, **source}, "horizon": 1, "windows": 1, "min_context": 1}
    )


def test_csv_and_parquet_below_a_prefix(put: Put, produce: Produce) -> None:
    buffer = io.BytesIO()
    long(("b", "2024-01-01", "D", [4, 5, 6])).to_parquet(buffer, index=False)
    put("daily/a.csv.gz", gzip.compress(long(("a", "2024-01-01", "D", [1, 2, 3])).to_csv(index=False).encode()))
    put("daily/readme.txt", b"not a table")
    put("daily-other/c.csv", b"nonsense")
    bucket = put("daily/deep/b.parquet", buffer.getvalue())
    made = produce(prepare_series, settings(f"s3://{bucket}/daily"))
    table = open_series(made)
    assert {name: table.target(number).tolist() for number, name in enumerate(table.item_ids)} == {
        "a": [1, 2, 3],
        "b": [4, 5, 6],
    }
    one = open_series(produce(prepare_series, settings(f"s3://{bucket}/daily/a.csv.gz")))
    assert one.item_ids == ["a"]


def test_the_fingerprint_follows_the_objects_and_nothing_else(put: Put) -> None:
    text = long(("a", "2024-01-01", "D", [1, 2, 3])).to_csv(index=False).encode()
    bucket = put("daily/a.csv", text)
    config = settings(f"s3://{bucket}/daily")
    first = config.fingerprint()
    put("daily/a.csv", text)  # the same bytes, at a later time
    put("daily/notes.txt", b"not a table")
    put("elsewhere/b.csv", text)
    assert config.fingerprint() == first
    put("daily/a.csv", text.replace(b"3", b"4"))
    second = config.fingerprint()
    put("daily/b.csv", text)
    assert len({first, second, config.fingerprint()}) == 3


@pytest.mark.parametrize(
    ("identity", "uri", "words"),
    [
        (READER, "s3://{}/absent", "names no object"),
        (("nobody", "x"), "s3://{}/daily", r"the credentials are refused \(InvalidAccessKeyId\)"),
        ((READER[0], "x"), "s3://{}/daily", r"the credentials are refused \(SignatureDoesNotMatch\)"),
        (READER, "s3://modelmill-absent/daily", "there is no such bucket|names no object"),
    ],
    ids=["no-object", "unknown-key", "wrong-secret", "no-bucket"],
)
def test_refusals_name_the_uri(
    put: Put,
    s3_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    identity: tuple[str, str],
    uri: str,
    words: str,
) -> None:
    uri = uri.format(put("daily/a.csv", b""))
    s3_server.enter(monkeypatch, identity)
    with pytest.raises(UserError, match=rf"^series\.source\.uri: {uri}:? ({words})"):
        settings(uri).fingerprint()


def test_an_endpoint_in_the_recipe(
    put: Put, produce: Produce, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = put("a.csv", long(("a", "2024-01-01", "D", [1, 2, 3])).to_csv(index=False).encode())
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    config = settings(f"s3://{bucket}/a.csv", endpoint_url=s3_server.endpoint)
    assert open_series(produce(prepare_series, config)).item_ids == ["a"]
