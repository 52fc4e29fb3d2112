"""Steps run in a store of their own, on a small corpus of real documentation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from moto.server import ThreadedMotoServer

from modelmill.components.core.events import STEP_VARIABLE
from modelmill.components.core.home import HOME_VARIABLE, Home
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepFunction
from modelmill.components.data.config import CorpusConfig, TokenizerConfig
from modelmill.components.data.corpus import ingest_corpus
from modelmill.components.data.tokenizer import train_tokenizer

# Examples take milliseconds, but other work on a small machine can stop one for longer than the default deadline.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

DISTRIBUTIONS = ["click", "Flask", "fsspec", "docker"]
Produce = Callable[..., Manifest]


def produce_in(folder: Path, step: StepFunction, config: Any, **upstream: Manifest) -> Manifest:
    """Run a step function as `run_step` does, without keys and reuse."""
    data = folder / "data"
    data.mkdir(parents=True)
    result = step(config, data, **upstream)
    return Manifest.describe(
        data, kind=result.kind, counts=result.counts, metrics=result.metrics, metadata=result.metadata
    )


@pytest.fixture(autouse=True)
def isolated(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home of its own; what `run_step` sets in the environment is undone after the test."""
    monkeypatch.setenv(STEP_VARIABLE, "")


@pytest.fixture
def produce(tmp_path: Path) -> Produce:
    """Run a step function into a folder that is named after it."""

    def run(step: StepFunction, config: Any, **upstream: Manifest) -> Manifest:
        made = len(list(tmp_path.glob(f"{step.__name__}*")))
        return produce_in(tmp_path / f"{step.__name__}{made}", step, config, **upstream)

    return run


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data-steps")
    os.environ.setdefault(HOME_VARIABLE, str(folder / "home"))
    return folder


@pytest.fixture(scope="session")
def corpus(shared: Path) -> Manifest:
    """About 300 kB of documentation of small distributions that the lock holds."""
    source = {"type": "installed-docs", "distributions": DISTRIBUTIONS}
    config = CorpusConfig.model_validate(
        {"source": source, "max_bytes": 300_000, "validation_fraction": 0.1, "test_fraction": 0.1}
    )
    return produce_in(shared / "corpus", ingest_corpus, config)


@pytest.fixture(scope="session")
def tokenizer(shared: Path, corpus: Manifest) -> Manifest:
    """A byte-level BPE of 1,024 entries trained on that corpus."""
    return produce_in(shared / "tokenizer", train_tokenizer, TokenizerConfig(vocab_size=1024), corpus=corpus)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of a local S3 server."""
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()
