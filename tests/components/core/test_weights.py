"""The digest of weights sees tensors, not files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modelmill.components.core.errors import UserError
from modelmill.components.core.weights import weights_digest

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(0)}


def folder(path: Path, *shards: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    path.mkdir()
    for number, shard in enumerate(shards):
        save_file(shard, path / f"model-{number}.safetensors", metadata=metadata)
    return path


def test_shards_order_and_metadata_do_not_matter(tmp_path: Path) -> None:
    whole = weights_digest(folder(tmp_path / "whole", TENSORS))
    rest = {name: TENSORS[name] for name in ("c", "a")}
    assert weights_digest(folder(tmp_path / "split", {"b": TENSORS["b"]}, rest, metadata={"x": "y"})) == whole


@pytest.mark.parametrize(
    "change",
    [
        {"a": TENSORS["a"] + 1e-7},
        {"a": TENSORS["a"].reshape(3, 2)},
        {"a": TENSORS["a"].to(torch.float64)},
        {"d": torch.zeros(1)},
    ],
)
def test_any_change_of_a_tensor_matters(tmp_path: Path, change: dict[str, torch.Tensor]) -> None:
    before = weights_digest(folder(tmp_path / "before", TENSORS))
    assert weights_digest(folder(tmp_path / "after", {**TENSORS, **change})) != before


def test_broken_files_are_one_line(tmp_path: Path) -> None:
    good = folder(tmp_path / "good", TENSORS) / "model-0.safetensors"
    data = good.read_bytes()
    for name, content in {"empty": b"", "short": data[:5], "header": data[:30], "long": b"\xff" * 16}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="is not a safetensors file"):
            weights_digest(tmp_path / name)
    good.write_bytes(data[:-3])
    with pytest.raises(UserError, match="ends inside tensor"):
        weights_digest(good.parent)
    with pytest.raises(UserError, match="holds no tensor"):
        weights_digest(tmp_path)
