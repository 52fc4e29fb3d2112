"""A tiny base and pairs of its words, made once."""

from __future__ import annotations

import pytest

from modelmill.components.core.manifest import Manifest
from tests.components.embedding import samples


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return samples.make_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return samples.make_base(tmp_path_factory.mktemp("base"))
