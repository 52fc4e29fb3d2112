"""A model in S3 as an artifact: safetensors only, with the digest of its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from modelmill.components.core import s3
from modelmill.components.core.errors import UserError
from modelmill.components.core.weights import weights_digest
from modelmill.components.registry.config import FetchModelConfig
from modelmill.components.registry.model_source import _is_model_file
from tests.components.registry.test_fetch_model import fetched, folder  # noqa: F401  (a fixture)
from tests.fakes.s3_server import READER, S3Server

Upload = Callable[..., str]


@pytest.fixture
def upload(s3_server: S3Server, home: object, monkeypatch: pytest.MonkeyPatch) -> Upload:
    """Put a folder's files, and more, below `models/small` of a new bucket; the step may only read there."""
    s3_server.enter(monkeypatch, READER)
    bucket = s3_server.bucket()

    def put(path: Path | None = None, **more: bytes) -> str:
        files = {file.name: file.read_bytes() for file in path.iterdir()} if path else {}
        for name, content in (files | {key.replace("__", "."): value for key, value in more.items()}).items():
            s3_server.client().put_object(Bucket=bucket, Key=f"models/small/{name}", Body=content)
        return f"s3://{bucket}/models/small"

    return put


def test_a_prefix_becomes_a_model_without_its_pickles(
    upload: Upload,
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    uri = upload(folder, **{"readme__md": b"x", "deep/er/config__json": b"{}"})
    made = fetched(tmp_path, reference=uri)
    assert {entry.path for entry in made.files} == {
        "model/config.json",
        "model/generation_config.json",
        "model/model.safetensors",
    }
    assert made.metadata["weights_digest"] == weights_digest(folder)
    assert made.metadata["reference"] == uri
    assert fetched(tmp_path / "again", reference=f"{uri}/").files == made.files


def test_the_state_follows_the_models_files_alone(upload: Upload, folder: Path) -> None:  # noqa: F811
    config = FetchModelConfig(reference=upload(folder))
    first = config.fingerprint()
    upload(folder, readme__md=b"another text", optimizer__pt=b"a pickle")
    assert config.fingerprint() == first
    settings = json.loads((folder / "config.json").read_text())
    upload(config__json=json.dumps({**settings, "rope_theta": 5e5}).encode())
    second = config.fingerprint()
    upload(tokenizer__json=b"{}")
    assert len({first, second, config.fingerprint()}) == 3


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, r"names no object; check the prefix"),
        ({"model__safetensors": b""}, r"has no config\.json"),
        ({"config__json": b"{}", "pytorch_model__bin": b""}, r"has no safetensors \(pytorch_model\.bin is a pickle"),
        ({"config__json": b"{}"}, r"has no safetensors \(it holds no weights\)"),
    ],
    ids=["nothing", "no-config", "pickle", "no-weights"],
)
def test_what_is_no_model_is_refused_before_it_is_fetched(
    upload: Upload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], words: str
) -> None:
    uri = upload(**files)
    monkeypatch.setattr(s3, "download", lambda *_: pytest.fail("nothing is fetched"))
    with pytest.raises(UserError, match=rf"^model\.reference: {uri} {words}"):
        fetched(tmp_path, reference=uri)
    with pytest.raises(UserError, match=rf"^model\.reference: {uri} {words}"):
        FetchModelConfig(reference=uri).fingerprint()


def test_a_model_that_changes_while_it_is_read(
    upload: Upload,
    folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri, real = upload(folder), s3.download

    def download(*given: object) -> None:
        real(*given)  # type: ignore[arg-type]
        upload(config__json=b'{"vocab_size": 1}')

    monkeypatch.setattr(s3, "download", download)
    with pytest.raises(UserError, match=r"changed while it was read; run again"):
        fetched(tmp_path, reference=uri)


def test_refusals_name_the_parameter(upload: Upload, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = upload(config__json=b"{}")
    with pytest.raises(UserError, match=r"^model\.reference: 's3://B' is not an S3 URI"):
        FetchModelConfig(reference="s3://B").fingerprint()
    s3_server.enter(monkeypatch, ("nobody", "x"))
    with pytest.raises(UserError, match=rf"^model\.reference: {uri}: the credentials are refused"):
        FetchModelConfig(reference=uri).fingerprint()


def test_an_output_of_the_step_is_equal_wherever_it_runs(upload: Upload, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    uri = upload(folder)
    one, two = (fetched(tmp_path / name, reference=uri) for name in ("one", "two"))
    assert one.digest == two.digest


@pytest.mark.parametrize(
    "key", ["../config.json", "a/../config.json", "./model.safetensors", "/config.json", "a//b.json"]
)
def test_a_key_never_leads_out_of_the_folder(key: str) -> None:
    """S3 allows such keys; not every server does."""
    assert not _is_model_file(key)
    assert _is_model_file("0_Transformer/config.json")
