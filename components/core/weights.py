"""Digest of a model's weights as a set of tensors, whatever files they are spread over."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from modelmill.components.core.errors import UserError

_BLOCK = 1 << 20


def weights_digest(folder: Path | str) -> str:
    """SHA-256, as hex, over name, dtype, shape and bytes of every tensor in a folder, in the order of the names.

    Reads safetensors with the standard library alone, in constant memory, so that any step can tell whether two
    folders hold the same model: sharding and metadata do not matter.

    Raises:
        UserError: the folder holds no safetensors, or a file is corrupt or truncated.
    """
    folder = Path(folder)
    tensors: dict[str, tuple[Path, dict[str, Any], int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        entries, begin = _header(path)
        for name, entry in entries.items():
            if name != "__metadata__":
                tensors[name] = (path, entry, begin)
    if not tensors:
        raise UserError(f"model: {folder} holds no tensor in safetensors files; give an exported model's folder")
    digest = hashlib.sha256()
    for name in sorted(tensors):
        path, entry, begin = tensors[name]
        digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
        first, last = entry["data_offsets"]
        with path.open("rb") as file:
            file.seek(begin + first)
            remaining = last - first
            while remaining:
                block = file.read(min(remaining, _BLOCK))
                if not block:
                    raise UserError(f"model: {path} ends inside tensor {name}; copy it again")
                digest.update(block)
                remaining -= len(block)
    return digest.hexdigest()


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file and where its data begins."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            entries = json.loads(file.read(length))
            if not isinstance(entries, dict):
                raise ValueError("its header is not an object")
    except (ValueError, struct.error) as error:
        raise UserError(f"model: {path} is not a safetensors file ({error}); copy it again") from None
    return entries, 8 + length
