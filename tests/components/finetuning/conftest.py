"""Bases and conversations, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXForCausalLM

from modelmill.components.core.manifest import Manifest
from tests.components.finetuning.samples import make_base, make_instructions


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture(scope="session")
def half(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same stored in bf16."""
    folder = tmp_path_factory.mktemp("bases") / "half"
    AutoModelForCausalLM.from_pretrained(str(llama), dtype=torch.bfloat16).save_pretrained(str(folder))
    return folder


def in_fp64(folder: Path, **changes: object) -> Path:
    """A model stored in fp64 whose norms compute in it too, unlike Llama's; its linear layers have biases."""
    make_base(folder, GPTNeoXForCausalLM, use_parallel_residual=True, **changes)
    AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float64).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return in_fp64(tmp_path_factory.mktemp("bases") / "exact")


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one table for the embedding and the head."""
    return in_fp64(tmp_path_factory.mktemp("bases") / "tied", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_instructions(tmp_path_factory.mktemp("data") / "instructions")
