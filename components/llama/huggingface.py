"""Exchange of weights with Hugging Face checkpoints, safetensors only.

A checkpoint folder holds `config.json` and either `model.safetensors` or shards with
`model.safetensors.index.json`. Pickled checkpoints (`pytorch_model.bin`) are refused: unpickling runs code.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modelmill.components.core.errors import UserError
from modelmill.components.llama.config import LlamaConfig
from modelmill.components.llama.model import LlamaDecoder
from modelmill.components.llama.pieces import Piece, pieces
from modelmill.components.training.gathering import whole
from modelmill.components.training.shards import Box, local_box, local_part

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_DTYPE_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
}


def load_huggingface(folder: Path | str, dtype: torch.dtype | None = None) -> LlamaDecoder:
    """Read a Llama checkpoint into a decoder on the CPU, fusing q/k/v and gate/up.

    Args:
        folder: holds `config.json` and the safetensors.
        dtype: of the parameters; None keeps that of the checkpoint's token embedding.

    Raises:
        UserError: the folder is not a Llama checkpoint this decoder implements; a tensor is missing, unexpected
            or mis-shaped; a file is missing, corrupt or truncated; or the checkpoint is a pickle.
    """
    folder = Path(folder)
    config = LlamaConfig.from_huggingface(_read_json(folder / "config.json", folder))
    with _tensors(config, folder) as source:
        if dtype is None:
            dtype = source["model.embed_tokens.weight"].get_tensor("model.embed_tokens.weight").dtype
        model = LlamaDecoder(config, device="meta", dtype=dtype).to_empty(device="cpu")
        _fill(model, source, folder)
    model.reset_rope("cpu")
    return model


def load_weights(model: LlamaDecoder, folder: Path | str) -> None:
    """Read a Llama checkpoint into a decoder that lies on its device, whole or sharded.

    Every rank reads the folder and keeps its own part; no more than one parameter is whole at a time.

    Args:
        model: of the checkpoint's architecture, though its `max_sequence_length` may differ.
        folder: holds `config.json` and the safetensors.

    Raises:
        UserError: as `load_huggingface`, or the architectures differ.
    """
    folder = Path(folder)
    config = LlamaConfig.from_huggingface(_read_json(folder / "config.json", folder))
    theirs, ours = config.model_dump(), model.config.model_dump()
    for field in sorted(theirs.keys() - {"max_sequence_length", "init_std"}):
        if theirs[field] != ours[field]:
            raise UserError(
                f"{folder}: {field} is {theirs[field]} in config.json and {ours[field]} in the model; use the"
                " architecture of the checkpoint"
            )
    with _tensors(config, folder) as source:
        _fill(model, source, folder)


@contextmanager
def _tensors(config: LlamaConfig, folder: Path) -> Iterator[dict[str, Any]]:
    """The open file of each tensor in a checkpoint that has those of the architecture and no others."""
    with ExitStack() as stack:
        handles = [stack.enter_context(_open(folder / name)) for name in _weight_files(folder)]
        source = {tensor: handle for handle in handles for tensor in handle.keys()}  # noqa: SIM118
        _check_names(config, set(source), folder)
        yield source


@torch.no_grad()
def _fill(model: LlamaDecoder, source: dict[str, Any], folder: Path) -> None:
    for name, parameter in model.state_dict().items():
        target, box = local_part(parameter), local_box(parameter)
        sharded = target.shape != parameter.shape
        fused = torch.empty(parameter.shape, dtype=target.dtype) if sharded else target
        for piece in pieces(model.config, name):
            _copy(source[piece.name], piece, fused, folder)
        if name == "embedding.weight" and model.config.tie_embeddings and "lm_head.weight" in source:
            head = source["lm_head.weight"].get_tensor("lm_head.weight").to(fused)
            if not torch.equal(head, fused):
                raise UserError(
                    f"{folder}: lm_head.weight differs from model.embed_tokens.weight although config.json"
                    " says tie_word_embeddings; set tie_word_embeddings to false"
                )
        if sharded:
            whole = Box((0,) * fused.dim(), tuple(fused.shape))
            target.copy_(fused[box.within(whole)])


def export_huggingface(
    model: LlamaDecoder,
    folder: Path | str,
    *,
    tokenizer_folder: Path | str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a checkpoint that `transformers.LlamaForCausalLM.from_pretrained` reads.

    Every file is written under a temporary name and then renamed, the weights before `config.json`; weight
    files of an earlier export into the same folder are removed. Equal weights give equal bytes, however they are
    sharded.

    In a process group every rank calls it: sharded parameters are gathered one at a time, and rank 0 writes.

    Args:
        model: its parameters may live on any device, whole or sharded.
        folder: made if missing.
        tokenizer_folder: its tokenizer files are copied, and its special tokens' ids recorded.
        max_shard_bytes: tensors are split over several files where one would be larger than this.
        dtype: of the written tensors; None keeps the model's.

    Raises:
        UserError: `tokenizer_folder` holds no tokenizer, `max_shard_bytes` is not positive, or `dtype` has no
            name in Hugging Face's config.
    """
    folder = Path(folder)
    dtype = model.embedding.weight.dtype if dtype is None else dtype
    if dtype not in _DTYPE_NAMES:
        raise UserError(f"dtype: {dtype} cannot be exported; use one of {', '.join(_DTYPE_NAMES.values())}")
    if max_shard_bytes < 1:
        raise UserError(f"max_shard_bytes: {max_shard_bytes} is not positive; use for example 5000000000")
    tokenizer = _tokenizer_files(Path(tokenizer_folder)) if tokenizer_folder is not None else []
    special = _special_token_ids(Path(tokenizer_folder)) if tokenizer_folder is not None else {}
    if dist.is_initialized() and dist.get_rank() > 0:
        _help_gather(model)
        return
    folder.mkdir(parents=True, exist_ok=True)
    _replace_weights(model, folder, dtype, max_shard_bytes)
    for file in tokenizer:
        shutil.copyfile(file, _temporary(folder / file.name))
        _publish(folder / file.name)
    name = _DTYPE_NAMES[dtype]
    config = {**model.config.to_huggingface(), **special, "dtype": name, "torch_dtype": name}
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **special})
    _write_json(folder / "config.json", config)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path.parent}: {path.name} is missing, corrupt or truncated ({error}); copy it again"
        ) from error


def _read_json(path: Path, folder: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{folder}: {path.name} is missing; use a folder with a Hugging Face checkpoint") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {path.name} is not readable JSON ({error}); copy it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{folder}: {path.name} is not a JSON object; copy it again")
    return value


def _weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that make up the checkpoint."""
    if (folder / INDEX_NAME).is_file():
        weight_map = _read_json(folder / INDEX_NAME, folder).get("weight_map")
        names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
        # An index is data from elsewhere: it must not point out of its folder.
        if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise UserError(f"{folder}: {INDEX_NAME} has no weight_map of plain file names; copy it again")
        return names
    if (folder / SINGLE_NAME).is_file():
        return [SINGLE_NAME]
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder}: {pickles[0]} is a pickle, and loading one can run code; convert the checkpoint"
            f" to {SINGLE_NAME}"
        )
    raise UserError(f"{folder}: holds no {SINGLE_NAME} or {INDEX_NAME}; use a folder with a Hugging Face checkpoint")


def _check_names(config: LlamaConfig, found: set[str], folder: Path) -> None:
    names = LlamaDecoder(config, device="meta").state_dict()
    expected = {piece.name for name in names for piece in pieces(config, name)}
    missing = sorted(expected - found)
    if missing:
        raise UserError(
            f"{folder}: tensor {missing[0]} is missing ({len(missing)} in all); copy the checkpoint again,"
            " or correct its config.json"
        )
    # transformers before 4.32 stored this constant; tied checkpoints may repeat the embedding as the head.
    unexpected = sorted(
        name
        for name in found - expected
        if not name.endswith("rotary_emb.inv_freq") and not (config.tie_embeddings and name == "lm_head.weight")
    )
    if unexpected:
        raise UserError(
            f"{folder}: tensor {unexpected[0]} is unexpected ({len(unexpected)} in all) and would be lost;"
            " use a plain Llama checkpoint, or correct its config.json"
        )


def _copy(handle: Any, piece: Piece, parameter: Tensor, folder: Path) -> None:
    """Read a Hugging Face tensor into its rows of the parameter."""
    target = piece.view(parameter)
    expected = list(target.shape if piece.rows is None else target.flatten(0, 1).shape)
    shape = handle.get_slice(piece.name).get_shape()
    if list(shape) != expected:
        raise UserError(
            f"{folder}: tensor {piece.name} has shape {list(shape)} where config.json implies"
            f" {expected}; correct config.json or copy the checkpoint again"
        )
    tensor = handle.get_tensor(piece.name)
    if not tensor.is_floating_point():
        raise UserError(f"{folder}: tensor {piece.name} is {tensor.dtype}; use a checkpoint that is not quantized")
    target.copy_(tensor.view(target.shape))


def _help_gather(model: LlamaDecoder) -> None:
    """The part in `_replace_weights` of a rank that writes nothing: the same gathers in the same order."""
    for parameter in model.state_dict().values():
        whole(parameter)


def _replace_weights(model: LlamaDecoder, folder: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    parameters = dict(model.state_dict())
    shards = _plan(model.config, parameters, dtype, max_shard_bytes)
    names = (
        [SINGLE_NAME]
        if len(shards) == 1
        else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    )
    published = list(names)
    gathered: tuple[str, Tensor] | None = None  # a parameter may lie in two files, and is gathered once
    try:
        for name, shard in zip(names, shards, strict=True):
            # Copied one file at a time: safetensors refuses views of one storage, which fused weights are.
            tensors = {}
            for path, piece in shard:
                if gathered is None or gathered[0] != path:
                    gathered = (path, whole(parameters[path]))
                tensors[piece.name] = _copied(piece.view(gathered[1]), dtype)
            save_file(tensors, _temporary(folder / name), metadata={"format": "pt"})
        if len(shards) > 1:
            weight_map = {piece.name: name for name, shard in zip(names, shards, strict=True) for _, piece in shard}
            total = sum(parameter.numel() for parameter in parameters.values()) * dtype.itemsize
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            _temporary(folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            published.append(INDEX_NAME)
    except BaseException:
        for name in [*names, INDEX_NAME]:
            _temporary(folder / name).unlink(missing_ok=True)
        raise
    for stale in folder.glob("model*.safetensors*"):
        if stale.name not in published:
            stale.unlink()
    for name in published:
        _publish(folder / name)


def _plan(
    config: LlamaConfig, parameters: dict[str, Tensor], dtype: torch.dtype, max_shard_bytes: int
) -> list[list[tuple[str, Piece]]]:
    """For each file what it holds: parameters' names with the pieces of them."""
    shards: list[list[tuple[str, Piece]]] = [[]]
    size = 0
    for path, parameter in parameters.items():
        for piece in pieces(config, path):
            nbytes = piece.view(torch.empty(parameter.shape, device="meta")).numel() * dtype.itemsize
            if shards[-1] and size + nbytes > max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append((path, piece))
            size += nbytes
    return shards


def _copied(part: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy on the CPU, with the groups of rows of a fused parameter joined to one matrix."""
    copy = part.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
    return copy.flatten(0, -2) if part.dim() > 1 else copy


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _publish(path: Path) -> None:
    """Make the temporary file of `path` durable, then visible under its name."""
    with _temporary(path).open("rb") as file:
        os.fsync(file.fileno())
    os.replace(_temporary(path), path)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    _temporary(path).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _publish(path)


def _tokenizer_files(folder: Path) -> list[Path]:
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not any(file.name in ("tokenizer.json", "tokenizer.model") for file in files):
        raise UserError(
            f"tokenizer_folder: {folder} holds no tokenizer.json or tokenizer.model;"
            " use the folder of a Hugging Face tokenizer"
        )
    return files


def _special_token_ids(folder: Path) -> dict[str, int]:
    """Ids of the tokens that `tokenizer_config.json` names as beginning, end and padding."""
    if not all((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return {}
    tokenizer = _read_json(folder / "tokenizer.json", folder)
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    ids.update({token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])})
    named = _read_json(folder / "tokenizer_config.json", folder)
    found = {}
    for role in ("bos", "eos", "pad"):
        token = named.get(f"{role}_token")
        content = token.get("content") if isinstance(token, dict) else token
        if content in ids:
            found[f"{role}_token_id"] = ids[content]
    return found
