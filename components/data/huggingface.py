"""Hugging Face datasets as a source, streamed through the `datasets` library. Code from a dataset is never run."""

from __future__ import annotations

import os
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

from modelmill.components.core.errors import UserError
from modelmill.components.data.config import HubDataset, HuggingFaceSource
from modelmill.components.data.files import folder_state
from modelmill.components.data.formats import checked_text

_COMMIT = re.compile(r"^[0-9a-f]{40}$")
_OFFLINE = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE")


def fingerprint_dataset(source: HubDataset) -> str:
    """State of the dataset: a local folder's files, else the commit that its revision names now.

    Raises:
        UserError: the dataset does not exist or the Hub cannot be reached.
    """
    folder = Path(source.name).expanduser()
    if folder.is_dir():
        return folder_state(folder)
    revision = source.revision or "main"
    if _COMMIT.fullmatch(revision):
        return revision
    if any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in _OFFLINE):
        return f"{revision} as cached"
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return str(HfApi().dataset_info(source.name, revision=revision, timeout=20).sha)
    except (RepositoryNotFoundError, HFValidationError):
        remedy = "give an existing folder or a dataset of the Hub (a private one needs HF_TOKEN)"
        raise UserError(
            f"{source.parameter}.name: {source.name!r} is neither a folder nor a dataset; {remedy}"
        ) from None
    except RevisionNotFoundError:
        problem = f"{source.name} has no revision {revision!r}; name another"
        raise UserError(f"{source.parameter}.revision: {problem}") from None
    except Exception as error:  # the HTTP stack below raises its own families of errors
        remedy = "check the network, or give a local folder or a full commit as revision"
        raise UserError(
            f"{source.parameter}.name: {source.name} cannot be looked up ({type(error).__name__}); {remedy}"
        ) from None


def read_dataset(source: HuggingFaceSource) -> Generator[str, None, None]:
    """Texts of the dataset in its own order.

    Raises:
        UserError: no such dataset, configuration, split or text column, or files that cannot be read.
    """
    for place, row in read_rows(source):
        if source.text_field not in row:
            held = ", ".join(map(repr, row))
            field = f"{source.text_field!r} but {held}"
            raise UserError(f"{source.parameter}.text_field: {source.name} has no column {field}; name another")
        yield checked_text(row[source.text_field], place, source.text_field)


def read_rows(source: HubDataset) -> Generator[tuple[str, dict[str, Any]], None, None]:
    """Whole rows of the dataset in its own order, each with its place: `name row n`, from 0.

    Raises:
        UserError: no such dataset, configuration or split, or files that cannot be read.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name = str(Path(source.name).expanduser()) if Path(source.name).expanduser().is_dir() else source.name
    try:
        rows = load_dataset(name, source.config, split=source.split, revision=source.revision, streaming=True)
        for number, row in enumerate(rows):
            yield f"{source.name} row {number}", row
    except (DatasetsError, ValueError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        remedy = "check name, config, split and revision"
        raise UserError(f"{source.parameter}.name: {source.name} cannot be read ({reason}); {remedy}") from None
