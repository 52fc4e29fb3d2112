"""Local paths and S3 URIs: what is taken, what is refused, and that nothing of a path gets lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelmill.components.core.errors import UserError
from modelmill.components.core.uri import is_remote, local_path, split_s3

segments = st.text(st.characters(blacklist_characters="\0/", blacklist_categories=("Cs",)), min_size=1, max_size=12)


@given(st.lists(segments, min_size=1, max_size=4))
def test_any_absolute_path_survives_the_trip_through_a_uri(parts: list[str]) -> None:
    path = Path("/", *parts)
    assert local_path(path.as_uri()) == path
    assert local_path(str(path)) == path or "://" in str(path)


@given(segments, segments)
def test_any_key_survives_s3(first: str, second: str) -> None:
    assert split_s3(f"s3://my-bucket/{first}/{second}") == ("my-bucket", f"{first}/{second}")


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("data/x", "data/x"),
        ("file:///data/a%20b", "/data/a b"),
        ("file://localhost/data/x", "/data/x"),
        ("FILE:///data/x", "/data/x"),
        ("file:///~/x", "/~/x"),
        ("/data/100%", "/data/100%"),
    ],
)
def test_local(uri: str, path: str) -> None:
    assert local_path(uri) == Path(path)
    assert not is_remote(uri)


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert local_path("~/x") == Path("/home/someone/x")


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "s3://bucket/x",
        "http://[bad",
        "hf:x://y",
        "a\0b",
        "file:///a%00b",
        "file://data/x",
        "file://host",
        "~no-one-/x",
    ],
)
def test_not_local(uri: str) -> None:
    with pytest.raises(UserError, match=r"^corpus\.path: "):
        local_path(uri, parameter="corpus.path")


@pytest.mark.parametrize(
    ("uri", "pair"),
    [
        ("s3://bucket", ("bucket", "")),
        ("s3://bucket/", ("bucket", "")),
        ("S3://bucket/key", ("bucket", "key")),
        ("s3://bucket//key", ("bucket", "key")),
        ("s3://bucket/a#b?c=d", ("bucket", "a#b?c=d")),
    ],
)
def test_s3(uri: str, pair: tuple[str, str]) -> None:
    assert split_s3(uri) == pair


@pytest.mark.parametrize(
    "uri", ["s3:/b/k", "bucket/key", "s3://", "s3://B/k", "s3://a/k", "s3://a..b/k", "s3://[x/k", ""]
)
def test_not_s3(uri: str) -> None:
    with pytest.raises(UserError, match="is not an S3 URI; write s3://bucket/key"):
        split_s3(uri)
