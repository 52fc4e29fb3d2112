"""Step `ingest_corpus`: collect text, clean it, drop duplicates, and split it by document."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections import Counter
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from modelmill.components.core import events, tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.step import StepResult
from modelmill.components.data.cleaning import Cleaner, Document, assign_split
from modelmill.components.data.config import CorpusConfig, InstalledDocsSource, Source
from modelmill.components.data.documents import SPLITS, DocumentWriter
from modelmill.components.data.installed_docs import installed_versions
from modelmill.components.data.sources import read_source

logger = logging.getLogger("modelmill")


class _Split:
    """One split being written: its file, its counts and a digest over its documents."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._writer = stack.enter_context(DocumentWriter(path))
        self._digest = hashlib.sha256()
        self.documents = self.bytes = 0

    def append(self, document: Document) -> None:
        self._writer.append(document.text, document.size)
        self._digest.update(document.digest)
        self.documents += 1
        self.bytes += document.size

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()


def ingest_corpus(config: CorpusConfig, output: Path) -> StepResult:
    """Write `train.arrow`, `validation.arrow`, `test.arrow` (column `text: large_string`) and `ingest.json`.

    Documents keep the order of the sources. Equal inputs give equal bytes.

    Args:
        config: sources, caps, filters and split.
        output: existing empty folder.

    Returns:
        kind `corpus`; counts `{split}_documents`, `{split}_bytes` (UTF-8), `read_documents` and `dropped_<reason>`.

    Raises:
        UserError: a source cannot be read, nothing is left of it, or a split stays empty.
    """
    cleaner, reports = Cleaner(config), []
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=output.parent, prefix="ingest-")))
        splits = {name: _Split(output / f"{name}.arrow", stack) for name in SPLITS}
        kept = 0
        for number, source in enumerate(config.source):
            share = None if config.max_bytes is None else (config.max_bytes - kept) // (len(config.source) - number)
            report, size = _ingest_source(source, config, share, cleaner, splits, scratch)
            reports.append(report)
            kept += size
        _check_splits(config, cleaner, splits)
    counts = {"read_documents": cleaner.read}
    for name, split in splits.items():
        counts |= {f"{name}_documents": split.documents, f"{name}_bytes": split.bytes}
    counts |= {f"dropped_{reason}": count for reason, count in cleaner.dropped.items()}
    record = {"sources": reports, "counts": counts}
    (output / "ingest.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    _report(config, splits, counts)
    return StepResult(kind="corpus", counts=counts)


def _ingest_source(
    source: Source,
    config: CorpusConfig,
    share: int | None,
    cleaner: Cleaner,
    splits: dict[str, _Split],
    scratch: Path,
) -> tuple[dict[str, Any], int]:
    """Read one source up to its share of the cap; returns its record for `ingest.json` and the bytes kept."""
    skipped: Counter[str] = Counter()
    dropped = cleaner.dropped.copy()
    documents = size = 0
    complete = True
    logger.info("reading %s", source.label)
    # Closed here, so that a cap ends downloads and open files now and not at the next garbage collection.
    with closing(read_source(source, config, scratch, skipped)) as texts:
        for raw in texts:
            document = cleaner.clean(raw)
            if document is None:
                continue
            if share is not None and size + document.size > share:
                cleaner.reject(document, "over_cap")
                complete = False
                break
            split = assign_split(
                document.digest, seed=config.seed, validation=config.validation_fraction, test=config.test_fraction
            )
            splits[split].append(document)
            documents, size = documents + 1, size + document.size
            events.progress(f"{documents} documents from {source.label}", size, share)
    record: dict[str, Any] = {
        "type": source.type,
        "documents": documents,
        "bytes": size,
        "complete": complete,
        "dropped": dict(sorted((cleaner.dropped - dropped).items())),
        "skipped": dict(sorted(skipped.items())),
    }
    if isinstance(source, InstalledDocsSource):
        record["distributions"] = installed_versions(source.distributions)
    end = "" if complete else ", stopped at its share of max_bytes"
    logger.info("%s: kept %d documents, %d bytes%s; passed over %s", source.label, documents, size, end, dict(skipped))
    return record, size


def _check_splits(config: CorpusConfig, cleaner: Cleaner, splits: dict[str, _Split]) -> None:
    total = sum(split.documents for split in splits.values())
    losses = ", ".join(f"{reason} {count}" for reason, count in cleaner.dropped.items() if count) or "none dropped"
    if not total:
        remedy = "give more text, or relax max_bytes, the document lengths or corpus.quality"
        raise UserError(f"corpus.source: no document is left of {cleaner.read} read ({losses}); {remedy}")
    fractions = {"validation": config.validation_fraction, "test": config.test_fraction}
    for name, split in splits.items():
        if not split.documents:
            remedy = (
                "give more documents (a long txt file: set its separator), raise the fraction or change corpus.seed"
            )
            if name == "train":
                remedy = "give more documents or lower validation_fraction and test_fraction"
            parameter = (
                f"corpus.{name}_fraction: {fractions[name]}" if name in fractions else "corpus.source: the rest"
            )
            raise UserError(f"{parameter} of {total} documents ({losses}) leaves the {name} split empty; {remedy}")


def _report(config: CorpusConfig, splits: dict[str, _Split], counts: dict[str, int]) -> None:
    for reason in sorted(name for name in counts if name.startswith("dropped_")):
        if counts[reason]:
            logger.info("%s: %d", reason, counts[reason])
    origin = ", ".join(source.label for source in config.source)
    for name, split in splits.items():
        logger.info("%s: %d documents, %d bytes", name, split.documents, split.bytes)
        tracking.log_dataset(
            name=f"corpus-{name}",
            digest=split.digest,
            source=origin,
            context=tracking.CONTEXTS[name],
            profile={"documents": split.documents, "bytes": split.bytes},
        )
    tracking.log_metrics(counts)
