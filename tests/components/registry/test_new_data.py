"""Whether a retraining has something to learn from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.registry.new_data import find_new_data
from modelmill.components.registry.retrain_config import NewDataConfig


def prepared(folder: Path, ids: list[str]) -> Manifest:
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"id": name, "messages": []}) + "\n" for name in ids))
    return Manifest.describe(folder, kind="instructions")


def champion(folder: Path, known: list[str] | None) -> Manifest:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    if known is not None:
        (folder / "training_records.txt").write_text("".join(f"{name}\n" for name in known))
    return Manifest.describe(folder, kind="model")


@pytest.mark.parametrize(
    ("known", "smallest", "new", "found"),
    [
        (None, 1, 3, True),  # a base model before the first champion
        ([], 1, 3, True),
        (["a", "b", "gone"], 1, 1, True),
        (["a", "b", "gone"], 2, 1, False),
        (["a", "b", "c"], 1, 0, False),
    ],
)
def test_new_records_are_those_the_champion_has_not_seen(
    tmp_path: Path, known: list[str] | None, smallest: int, new: int, found: bool
) -> None:
    data, model = prepared(tmp_path / "data", ["a", "b", "c"]), champion(tmp_path / "model", known)
    (tmp_path / "out").mkdir()
    result = find_new_data(NewDataConfig(min_records=smallest), tmp_path / "out", data=data, champion=model)
    assert result.counts == {"records": 3, "known": 3 - new, "new": new}
    assert result.metadata["found"] is found
    assert json.loads((tmp_path / "out" / "new_data.json").read_text())["new"] == new


def test_no_training_record_is_an_error(tmp_path: Path) -> None:
    data, model = prepared(tmp_path / "data", []), champion(tmp_path / "model", None)
    with pytest.raises(UserError, match="the training split is empty"):
        find_new_data(NewDataConfig(), tmp_path, data=data, champion=model)
