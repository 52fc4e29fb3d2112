"""The longest files come first, so that no worker of `make test` is left alone with one at the end."""

from __future__ import annotations

import pytest

from tests.fakes.s3_server import own_s3_server, s3_server  # noqa: F401  (fixtures)

# Half a minute to ten seconds of processor time each; goes with xdist's --dist loadfile --no-loadscope-reorder, as
# by default files with many tests come first, and the long ones have few.
LONGEST = (
    "tests/components/llama/test_pretrain.py",
    "tests/test_notebooks.py",
    "tests/components/core/test_interrupted_delivery.py",
    "tests/e2e/test_laptop_recipes.py",
    "tests/components/training/test_layouts.py",
    "tests/pipelines/test_run.py",
    "tests/pipelines/test_cancel.py",
    "tests/components/training/test_launch.py",
    "tests/components/finetuning/test_whole_way.py",
    "tests/pipelines/test_command.py",
    "tests/components/llama/test_sharded.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {path: number for number, path in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(place)))
