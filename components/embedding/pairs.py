"""Step `prepare_pairs`: pairs of texts that belong together, checked, split and written out."""

from __future__ import annotations

import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelmill.components.core import events, tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepResult
from modelmill.components.data.cleaning import assign_split, digest
from modelmill.components.data.conversations import BadRecord
from modelmill.components.data.documents import SPLITS
from modelmill.components.data.instruction_config import InstalledDocsQuestions
from modelmill.components.embedding.config import PARAMETER, PairsConfig, RecordSource
from modelmill.components.embedding.pair_sources import Pair, read_pair, read_pair_records

logger = logging.getLogger("modelmill")
_NAMED = 20  # bad records that are told of one by one; the counts tell of all
BELONGING = 0.5  # scored pairs from here on belong together
_RANKS = {"train": 0, "validation": 1, "test": 2}  # a text that stands in several splits stays in the last of them


@dataclass(frozen=True)
class _Placed:
    """A pair on its way into a split, with the digests of its texts: case and blanks do not tell texts apart."""

    pair: Pair
    split: str
    question: bytes
    positive: bytes

    @classmethod
    def of(cls, pair: Pair, split: str | None, config: PairsConfig) -> _Placed:
        question, positive = (digest(" ".join(text.casefold().split())) for text in (pair.question, pair.positive))
        shares = {"validation": config.validation_fraction, "test": config.test_fraction}
        return cls(pair, split or assign_split(positive, seed=config.seed, **shares), question, positive)


def prepare_pairs(config: PairsConfig, output: Path) -> StepResult:
    """Read pairs and put each into one split.

    Writes `train.jsonl`, `validation.jsonl` and `test.jsonl` with `id` (of the question), `positive_id`, `question`,
    `positive` and, where a source has them, `score`; and `pairs.json` with what became of every record.

    A pair is split by a hash of its text to find. No text stands in two splits: what occurs in the test is dropped
    from the others, and what occurs in validation from training.

    Args:
        config: sources, fractions and seed.
        output: an empty folder.

    Returns:
        kind `pairs`; metadata `scored`: whether the pairs have scores.

    Raises:
        UserError: a source cannot be read, more records are bad than allowed, or training or test stays empty.
    """
    reader = _Reader(config)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix="pairs-") as scratch:
        placed = [entry for number in range(len(config.source)) for entry in reader.read(number, Path(scratch))]
    kept = _separate(placed, reader.dropped)
    counts = {f"{split}_pairs": sum(entry.split == split for entry in kept) for split in SPLITS}
    _check(config, counts, reader)
    for split in SPLITS:
        _write(output / f"{split}.jsonl", [entry for entry in kept if entry.split == split], reader.scored)
        counts[f"{split}_questions"] = len({entry.question for entry in kept if entry.split == split})
    counts |= {"read_records": reader.read_records}
    counts |= {f"dropped_{reason}": count for reason, count in sorted(reader.dropped.items())}
    record = {"counts": counts, "sources": reader.reports}
    (output / "pairs.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return StepResult("pairs", counts=counts, metadata={"scored": reader.scored})


def track_pairs(pairs: Manifest, *splits: str) -> None:
    """Report the splits that a step uses, with their digests."""
    tracking.log_splits(pairs, splits, name="pairs", suffix=".jsonl", units=("pairs", "questions"))


def read_pairs(pairs: Manifest, split: str, *, together: bool) -> list[dict[str, Any]]:
    """Pairs of a split in their order, with the fields that `prepare_pairs` wrote.

    Args:
        pairs: manifest of `prepare_pairs`.
        split: train, validation or test.
        together: leave out pairs whose score says that they do not belong together.

    Raises:
        UserError: the artifact is of another kind, or its file is not what was written.
    """
    if pairs.kind != "pairs":
        raise UserError(f"pairs: {pairs.uri} is of kind {pairs.kind}; run prepare_pairs")
    with pairs.path(f"{split}.jsonl").open(encoding="utf-8") as file:
        found = [json.loads(line) for line in file]
    return [pair for pair in found if not together or pair.get("score", 1.0) >= BELONGING]


class _Reader:
    """Reads the sources one after the other and counts what is dropped by reason."""

    def __init__(self, config: PairsConfig) -> None:
        self._config = config
        self.bad: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter(dict.fromkeys(("duplicate", "in_other_split"), 0))
        self.reports: list[dict[str, Any]] = []
        self.read_records = 0
        records = [source for source in config.source if not isinstance(source, InstalledDocsQuestions)]
        self.scored = any(source.fields.score is not None for source in records)

    def read(self, number: int, scratch: Path) -> Iterator[_Placed]:
        """Good pairs of a source."""
        source = self._config.source[number]
        logger.info("reading %s", source.label)
        before, lost, skipped = self.read_records, self.dropped.copy(), Counter[str]()
        if isinstance(source, InstalledDocsQuestions):
            yield from self._questions(source, skipped)
        else:
            yield from self._records(source, scratch)
        report = {"type": source.type, "records": self.read_records - before}
        lost = self.dropped - lost
        self.reports.append(
            {**report, "dropped": dict(sorted(lost.items())), "skipped": dict(sorted(skipped.items()))}
        )

    def _records(self, source: RecordSource, scratch: Path) -> Iterator[_Placed]:
        # Closed here, so that an error ends downloads and open files now and not at the next garbage collection.
        with closing(read_pair_records(source, scratch)) as records:
            for place, value in records:
                self.read_records += 1
                events.progress(f"records from {source.label}", self.read_records)
                try:
                    pair = read_pair(value, source.fields)
                except BadRecord as problem:
                    self._refuse(place, problem)
                else:
                    yield _Placed.of(pair, source.into, self._config)

    def _questions(self, source: InstalledDocsQuestions, skipped: Counter[str]) -> Iterator[_Placed]:
        from modelmill.components.data.installed_docs_qa import read_questions
        from modelmill.components.data.instruction_config import InstructionsConfig

        shares = self._config.model_dump(include={"validation_fraction", "test_fraction", "seed"})
        for found in read_questions(source, InstructionsConfig(source=[source], **shares), None, skipped):
            self.read_records += 1
            question, answer = (message.content for message in found.messages)
            yield _Placed.of(Pair(question, answer), found.split, self._config)

    def _refuse(self, place: str, problem: BadRecord) -> None:
        self.bad[problem.reason] += 1
        self.dropped[problem.reason] += 1
        allowed = self._config.max_bad_records
        if self.bad.total() > allowed:
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(self.bad.items()))
            before = f" ({self.bad.total()} bad records: {reasons})" if allowed else ""
            remedy = f"mend or remove the record, or raise pairs.max_bad_records (it is {allowed})"
            raise UserError(f"{PARAMETER}: {place} {problem}{before}; {remedy}")
        if self.bad.total() <= _NAMED:
            logger.warning("dropped %s %s", place, problem)


def _separate(placed: list[_Placed], dropped: Counter[str]) -> list[_Placed]:
    """The pairs without duplicates and without those that have a text in a split that goes before their own."""
    highest: dict[tuple[str, bytes], int] = {}
    for entry in placed:
        for text in (("question", entry.question), ("positive", entry.positive)):
            highest[text] = max(highest.get(text, 0), _RANKS[entry.split])
    kept: dict[tuple[bytes, bytes], _Placed] = {}
    for entry in placed:
        rank = _RANKS[entry.split]
        if highest["question", entry.question] > rank or highest["positive", entry.positive] > rank:
            dropped["in_other_split"] += 1
        elif (entry.question, entry.positive) in kept:
            dropped["duplicate"] += 1
        else:
            kept[entry.question, entry.positive] = entry
    return list(kept.values())


def _check(config: PairsConfig, counts: dict[str, int], reader: _Reader) -> None:
    total = sum(counts.values())
    losses = ", ".join(f"{reason} {count}" for reason, count in sorted(reader.dropped.items()) if count)
    if not total:
        raise UserError(
            f"{PARAMETER}: no pair is left of {reader.read_records} records ({losses or 'none dropped'}); give others"
        )
    fractions = {"validation": config.validation_fraction, "test": config.test_fraction}
    for split in ("train", "test"):
        if not counts[f"{split}_pairs"]:
            share = f"_fraction: {fractions[split]}" if split in fractions else ": the rest"
            raise UserError(
                f"pairs.{split}{share} of {total} pairs ({losses or 'none dropped'}) leaves the {split} split empty;"
                " give more records, change the fractions or pairs.seed, or name a source's split with `into`"
            )


def _write(path: Path, entries: list[_Placed], scored: bool) -> None:
    with path.open("w", encoding="utf-8") as file:
        for entry in entries:
            pair = entry.pair
            record: dict[str, Any] = {"id": entry.question.hex(), "positive_id": entry.positive.hex()}
            record |= {"question": pair.question, "positive": pair.positive}
            if scored:
                record["score"] = pair.score
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
