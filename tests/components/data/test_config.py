"""The sections of a recipe that concern data: what is refused, and what a fingerprint notices."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from pydantic import ValidationError

from modelmill.components.core.errors import UserError
from modelmill.components.data.config import DOCUMENTED_DISTRIBUTIONS, CorpusConfig, PackingConfig, TokenizerConfig

ROOT = Path(__file__).resolve().parents[3]


def files(*paths: Path | str) -> CorpusConfig:
    return CorpusConfig.model_validate({"source": {"type": "files", "paths": [str(path) for path in paths]}})


def test_one_source_is_the_same_as_a_list_of_one() -> None:
    source = {"type": "files", "paths": ["a.txt"]}
    one, listed = (CorpusConfig.model_validate({"source": value}) for value in (source, [source]))
    assert one == listed
    assert CorpusConfig.model_validate(one.model_dump(mode="json")) == one


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"source": []}, "at least 1"),
        ({"source": {"type": "ftp"}}, "installed-docs"),
        ({"source": {"type": "files", "paths": []}}, "at least 1"),
        ({"source": {"type": "files", "paths": ["a"], "pattern": "x"}}, "Extra inputs"),
        ({"source": {"type": "installed-docs", "distributions": ["numpy", "ModelMill"]}}, "modelmill is not a source"),
        ({"source": {"type": "installed-docs", "distributions": ["a_b", "A-b"]}}, "named twice"),
        ({"source": {"type": "s3", "uri": "s3://bucket/a", "endpoint_url": "http://me:secret@host"}}, "pattern"),
        ({"validation_fraction": 0.6, "test_fraction": 0.4}, "leaves nothing to train on"),
        ({"validation_fraction": 0}, "greater than 0"),
        ({"min_document_length": 50, "max_document_length": 10}, "below min_document_length"),
        ({"max_bytes": 0}, "greater than or equal to 1"),
        ({"quality": {"min_letter_share": 1.5}}, "less than or equal to 1"),
    ],
)
def test_corpus_refuses(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        CorpusConfig.model_validate({"source": {"type": "installed-docs"}} | values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "load"}, "path: is missing"),
        ({"path": "tokenizer.json"}, "set kind to load"),
        ({"vocab_size": 258}, "greater than or equal to 259"),
        ({"bos_token": "<x>", "eos_token": "<x>"}, "name one token twice"),
    ],
)
def test_tokenizer_refuses(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TokenizerConfig.model_validate(values)


def test_packing_refuses_a_row_without_tokens() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        PackingConfig(sequence_length=0)


def test_default_distributions_come_with_the_extras_of_the_demo() -> None:
    """Whoever installs train, kfp, track and eval has every one of them."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"].split("\n")
    for extra in ("train", "kfp", "track", "eval"):
        lines += config["options.extras_require"][extra].split("\n")
    waiting, certain = [Requirement(line) for line in lines if line], set()
    while waiting:
        name = waiting.pop().name
        if normal(name) in certain:
            continue
        certain.add(normal(name))
        needs = [Requirement(line) for line in importlib.metadata.requires(name) or []]
        waiting += [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    assert {normal(name) for name in DOCUMENTED_DISTRIBUTIONS} <= certain


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_fingerprints_need_no_heavy_library(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    code = f"""
import sys
from modelmill.components.data.config import CorpusConfig, TokenizerConfig
CorpusConfig(source=[{{"type": "installed-docs"}}, {{"type": "files", "paths": [{str(tmp_path)!r}]}}]).fingerprint()
TokenizerConfig().fingerprint()
print(" ".join(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & {"torch", "transformers", "pyarrow", "datasets", "tokenizers", "numpy", "mlflow", "kfp"}


def test_fingerprint_of_installed_docs_names_versions() -> None:
    config = CorpusConfig.model_validate({"source": {"type": "installed-docs", "distributions": ["click", "Flask"]}})
    versions = [f"{name}=={importlib.metadata.version(name)}" for name in ("click", "Flask")]
    assert config.fingerprint() == f"installed-docs:{','.join(versions)}"


def test_missing_distribution_is_named() -> None:
    source = {"type": "installed-docs", "distributions": ["click", "no-such-distribution"]}
    with pytest.raises(UserError, match=r"corpus\.source\.distributions: 'no-such-distribution' is not installed"):
        CorpusConfig.model_validate({"source": source}).fingerprint()


def test_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("first")
    (folder / "deep" / "b.md").write_text("second")
    before = files(folder).fingerprint()
    shutil.copytree(folder, tmp_path / "two")  # copies times too
    assert files(tmp_path / "two").fingerprint() == before
    (folder / "note.pdf").write_text("not read")
    assert files(folder).fingerprint() == before
    os.utime(folder / "a.txt", (1, 1))
    touched = files(folder).fingerprint()
    (folder / "deep" / "b.md").rename(folder / "deep" / "c.md")
    renamed = files(folder).fingerprint()
    (folder / "d.jsonl.zst").write_text("")
    assert len({before, touched, renamed, files(folder).fingerprint()}) == 4


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("absent.txt", "absent.txt does not exist"),
        ("slides.pdf", "slides.pdf has a format that is not read"),
        ("empty", "holds no file that can be read"),
        ("s3://bucket/key.txt", "is not a local path"),
        ("a\0b", "holds a NUL byte"),
    ],
)
def test_wrong_paths_are_told_before_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slides.pdf").write_text("x")
    (tmp_path / "empty" / ".hidden").mkdir(parents=True)
    (tmp_path / "empty" / ".hidden" / "a.txt").write_text("x")
    with pytest.raises(UserError, match=words) as caught:
        files(path).fingerprint()
    assert str(caught.value).startswith("corpus.source.paths: ")


def test_a_link_to_nothing_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(UserError, match="link to nothing"):
        files(tmp_path).fingerprint()


def test_bad_s3_uri_needs_no_network() -> None:
    config = CorpusConfig.model_validate({"source": {"type": "s3", "uri": "s3:/bucket/key"}})
    with pytest.raises(UserError, match=r"corpus\.source\.uri: 's3:/bucket/key' is not an S3 URI"):
        config.fingerprint()


def test_tokenizer_fingerprint(tmp_path: Path) -> None:
    assert TokenizerConfig().fingerprint() == ""
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match=r"tokenizer\.path: .* does not exist"):
        TokenizerConfig(kind="load", path=str(path)).fingerprint()
    path.write_text("{}")
    before = TokenizerConfig(kind="load", path=str(path)).fingerprint()
    path.write_text("{ }")
    assert TokenizerConfig(kind="load", path=str(path)).fingerprint() != before
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(UserError, match="is no tokenizer"):
        TokenizerConfig(kind="load", path=str(tmp_path / "vocab.txt")).fingerprint()
