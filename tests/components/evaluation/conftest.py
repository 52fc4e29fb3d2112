"""A model that answers and prepared conversations, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelmill.components.core.manifest import Manifest
from tests.components.evaluation.answering import Answering, make_answering, make_corpus


@pytest.fixture(scope="session")
def answering(tmp_path_factory: pytest.TempPathFactory) -> Answering:
    return make_answering(tmp_path_factory.mktemp("answering"))


@pytest.fixture(scope="session")
def text_corpus(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder: Path = tmp_path_factory.mktemp("text-corpus")
    return make_corpus(folder / "corpus")
