"""What preparing conversations and preparing pairs share: the split of a record, its file, and what is said of it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from modelmill.components.core import tracking
from modelmill.components.core.errors import UserError
from modelmill.components.data.bad_records import BadRecords
from modelmill.components.data.cleaning import assign_split
from modelmill.components.data.instruction_packing import TokenStore

logger = logging.getLogger("modelmill")
BATCH_CHARACTERS = 2 << 20  # of text in one call of the tokenizer


class SplitConfig(Protocol):
    """What a section says of its splits."""

    @property
    def source(self) -> Sequence[Any]: ...

    @property
    def validation_fraction(self) -> float: ...

    @property
    def test_fraction(self) -> float: ...

    @property
    def seed(self) -> int: ...

    @property
    def max_bad_records(self) -> int: ...


class SplitWriter:
    """One split being written: its records, their tokens, their number and a digest."""

    def __init__(self, output: Path, scratch: Path, name: str, dtype: np.dtype, stack: ExitStack) -> None:
        path = output / f"{name}.jsonl"
        self.file: IO[str] = stack.enter_context(path.open("w", encoding="utf-8"))
        self.store = TokenStore(scratch, name, dtype)
        stack.callback(self.store.close)
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, identity: bytes, source: int, record: Mapping[str, Any]) -> None:
        """A record's line; its tokens are the caller's to store."""
        line = {"id": identity.hex(), "source": source, **record}
        self.file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.digest.update(identity)
        self.size += 1


class SplitChooser:
    """Says which split a record goes into, and counts those that go into none by reason."""

    def __init__(self, config: SplitConfig, section: str, reasons: Sequence[str]) -> None:
        self._shares = {"validation": config.validation_fraction, "test": config.test_fraction}
        self._seed = config.seed
        self._seen: set[bytes] = set()
        self._split_of: dict[bytes, str] = {}  # by the prompt's digest: a prompt stands in one split only
        self.bad = BadRecords(section, config.max_bad_records)
        self.dropped: Counter[str] = Counter(dict.fromkeys(reasons, 0))
        self.read = self.truncated = self.unended = 0

    @property
    def losses(self) -> Counter[str]:
        """Records that were dropped so far, by reason."""
        losses = self.dropped.copy()
        losses.update(self.bad.counts)
        return losses

    def choose(self, identity: bytes, prompt: bytes, split: str | None) -> str | None:
        """The split of a record; None drops one that came up before, or whose prompt stands in another split.

        Args:
            identity: digest of its content.
            prompt: digest of its prompt.
            split: the one it has to go into; None takes that of its prompt's hash.
        """
        wanted = split or assign_split(prompt, seed=self._seed, **self._shares)
        if identity in self._seen:
            self.dropped["duplicate"] += 1
        elif self._split_of.setdefault(prompt, wanted) != wanted:
            self.dropped["in_other_split"] += 1
        else:
            self._seen.add(identity)
            return wanted
        return None


def check_splits(
    config: SplitConfig,
    chooser: SplitChooser,
    splits: Mapping[str, SplitWriter],
    *,
    section: str,
    unit: str,
    more: str,
) -> None:
    """Refuse splits that were asked for and stay empty.

    Args:
        config: the section.
        chooser: that read the records.
        splits: what became of them.
        section: how the recipe calls it.
        unit: what a split holds, in the singular.
        more: what a source is to have more of.

    Raises:
        UserError: nothing is left at all, or nothing of one split.
    """
    losses = ", ".join(f"{reason} {n}" for reason, n in sorted(chooser.losses.items()) if n) or "none dropped"
    total = sum(split.size for split in splits.values())
    if not total:
        remedy = "give others, or a longer sequence_length where they are too_long or unlearnt"
        raise UserError(f"{section}.source: no {unit} is left of {chooser.read} records ({losses}); {remedy}")
    given = {getattr(source, "into", None) for source in config.source}
    for name, split in splits.items():
        fraction = {"validation": config.validation_fraction, "test": config.test_fraction}.get(name, 1.0)
        if split.size or not (name in given or (fraction and None in given)):
            continue
        parameter = f"{section}.{name}_fraction: {fraction}" if name != "train" else f"{section}.source: the rest"
        remedy = f"give more {more}, change the fractions or {section}.seed, or name a source's split with `into`"
        raise UserError(f"{parameter} of {total} {unit}s ({losses}) leaves the {name} split empty; {remedy}")


def log_splits(
    config: SplitConfig, splits: Mapping[str, SplitWriter], counts: Mapping[str, int], *, section: str, unit: str
) -> None:
    """Say in the log and in tracking what the splits hold.

    Args:
        config: the section.
        splits: complete.
        counts: of the step, with `<split>_<unit>s`, `_rows`, `_tokens` and `_targets`.
        section: how the recipe calls it.
        unit: what a split holds, in the singular.
    """
    origin = ", ".join(source.label for source in config.source)
    for name, split in splits.items():
        profile = {key: counts[f"{name}_{key}"] for key in (f"{unit}s", "rows", "tokens", "targets")}
        logger.info("%s: %s", name, ", ".join(f"{count} {key}" for key, count in profile.items()))
        if split.size:
            digest = split.digest.hexdigest()
            tracking.log_dataset(
                name=f"{section}-{name}",
                digest=digest,
                source=origin,
                context=tracking.CONTEXTS[name],
                profile=profile,
            )
    tracking.log_metrics(counts)
