"""Step `prepare_instructions`: conversations to learn from, checked, split, written out and packed with loss masks."""

from __future__ import annotations

import json
import logging
import tempfile
from collections import Counter
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from modelmill.components.core import events
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepResult
from modelmill.components.data.chat_template import ConversationTemplate, Rendered, make_template
from modelmill.components.data.conversations import (
    BadRecord,
    Message,
    content_digest,
    prompt_digest,
    read_conversation,
)
from modelmill.components.data.documents import SPLITS
from modelmill.components.data.installed_docs_qa import read_questions
from modelmill.components.data.instruction_config import (
    InstalledDocsQuestions,
    InstructionsConfig,
    InstructionSource,
)
from modelmill.components.data.instruction_packing import write_rows
from modelmill.components.data.instruction_rows import IGNORE, InstructionRows
from modelmill.components.data.instruction_sources import in_reading_order, read_source
from modelmill.components.data.prepared_splits import (
    BATCH_CHARACTERS,
    SplitChooser,
    SplitWriter,
    check_splits,
    log_splits,
)
from modelmill.components.data.preview import Shown, report, show, write_preview
from modelmill.components.data.tokenizer_files import TokenizerFiles, load_tokenizer, span_mask

logger = logging.getLogger("modelmill")
_REASONS = ("duplicate", "in_other_split", "too_long", "unlearnt")


class _Waiting(NamedTuple):
    """A conversation on its way into a split: written out and not yet tokenised."""

    messages: list[Message]
    rendered: Rendered
    source: int
    split: str
    identity: bytes


class _Collector(SplitChooser):
    """Takes records one at a time and puts those that are good into their splits; counts the others by reason."""

    def __init__(
        self,
        config: InstructionsConfig,
        tokenizer: TokenizerFiles,
        template: ConversationTemplate,
        splits: dict[str, SplitWriter],
    ) -> None:
        super().__init__(config, "instructions", _REASONS)
        self._config, self._tokenizer, self._template, self._splits = config, tokenizer, template, splits
        self._waiting: list[_Waiting] = []
        self._characters = 0

    def take(self, value: Any, place: str, number: int, source: InstructionSource) -> None:
        """A record of a source that is split by hash, or goes into one split as a whole."""
        assert not isinstance(source, InstalledDocsQuestions)
        try:
            messages = read_conversation(value, source.records, self._config.system)
            self.add(messages, number, source.into)
        except BadRecord as problem:
            self.refuse(place, problem)

    def add(self, messages: list[Message], source: int, split: str | None) -> None:
        """A conversation, to be put into a split or into the one of its prompt's digest.

        Raises:
            BadRecord: the template cannot write it out.
        """
        self._tokenizer.check(messages)
        rendered = self._template.render(messages)
        self.read += 1
        identity = content_digest(messages)
        chosen = self.choose(identity, prompt_digest(messages), split)
        if chosen is None:
            return
        self._waiting.append(_Waiting(messages, rendered, source, chosen, identity))
        self._characters += len(rendered.text)
        if self._characters >= BATCH_CHARACTERS:
            self.flush()

    def refuse(self, place: str, problem: BadRecord) -> None:
        """Count a bad record.

        Raises:
            UserError: it is one too many.
        """
        self.read += 1
        self.bad.refuse(place, problem)

    def skip(self, problem: BadRecord) -> None:
        """Count a record that is dropped whatever `max_bad_records` says."""
        self.read += 1
        self.dropped[problem.reason] += 1

    def flush(self) -> None:
        """Tokenise what waits."""
        encoder = self._tokenizer.encoder
        texts = [entry.rendered.text for entry in self._waiting]
        for entry, encoded in zip(self._waiting, encoder.encode_batch(texts, add_special_tokens=False), strict=True):
            everything = self._config.train_on == "all"
            spans = ((0, len(entry.rendered.text)),) if everything else entry.rendered.spans
            self._store(entry, np.array(encoded.ids, np.int64), span_mask(encoded, spans))
        self._waiting, self._characters = [], 0

    def _store(self, entry: _Waiting, tokens: np.ndarray, mask: np.ndarray) -> None:
        longest = self._config.sequence_length + 1
        cut = len(tokens) > longest
        if cut and self._config.too_long == "drop":
            self.dropped["too_long"] += 1
            return
        tokens, mask = tokens[:longest], mask[:longest]
        if not mask[1:].any():
            self.dropped["unlearnt"] += 1
            return
        self.truncated += cut
        self.unended += not cut and not self._tokenizer.ends_specially(entry.rendered.text)
        split = self._splits[entry.split]
        split.write(entry.identity, entry.source, {"messages": [message.as_dict() for message in entry.messages]})
        split.store.append(tokens, mask)


def prepare_instructions(
    config: InstructionsConfig, output: Path, *, tokenizer: Manifest, corpus: Manifest | None = None
) -> StepResult:
    """Write, for each split, its conversations and their tokens packed into rows with loss masks.

    Of every split (`train`, `validation`, `test`):
        `<split>.jsonl`: one conversation a line: `id` (hex digest of its content), `source` (number in the section),
            `messages` (`role`, `content`).
        `<split>.tokens.npy`: ids, uint16 or uint32 [rows, sequence_length + 1].
        `<split>.loss_mask.npy`: 1 where the token is a target of the loss, uint8, same shape.
        `<split>.documents.npy`: number of the conversation within its row, uint16, same shape; padding is one more.
        `<split>.places.npy`: row, first position, tokens and targets of each line of the `.jsonl`, int64 [n, 4].
        `<split>.targets.npy`: targets of each row, int32 [rows].
    And `instructions.json` (counts by source and reason), `preview.txt` and `preview.html`.
    `instruction_rows` reads them. Equal inputs give equal bytes.

    Args:
        config: sources, template, split and row length.
        output: existing empty folder.
        tokenizer: manifest of `train_tokenizer`, or of an exported model with its tokenizer.
        corpus: manifest of the `ingest_corpus` that pretraining read; `installed-docs-qa` asks in the test only about
            what it held out.

    Returns:
        kind `instructions`; counts `vocab_size`, `sequence_length`, per split `_conversations`, `_rows`, `_tokens`
        (padding excluded), `_targets`; `read_records`, `truncated`, `dropped_<reason>`; metric `fill` (share of the
        training rows that is not padding); metadata `dtype`, `pad_token_id`, `eos_token_id`, `ignore_index`,
        `train_on` and `template` (for `chat_template.open_template`).

    Raises:
        UserError: a source cannot be read, more records are bad than allowed, the tokenizer has no chat template and
            none is given, or a split stays empty.
    """
    files = load_tokenizer(tokenizer)
    template = make_template(config, files)
    pad, eos = files.id_of(files.pad), files.id_of(files.eos)
    padding = pad if pad is not None else eos if eos is not None else 0  # never seen by the loss
    dtype = np.dtype("<u2" if files.vocab_size <= 1 << 16 else "<u4")
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=output.parent, prefix="instructions-")))
        splits = {name: SplitWriter(output, scratch, name, dtype, stack) for name in SPLITS}
        collector = _Collector(config, files, template, splits)
        sources = _read_sources(config, collector, corpus, scratch)
        check_splits(config, collector, splits, section="instructions", unit="conversation", more="records")
        counts, shown, fill = _pack(config, output, splits, padding, files)
    counts |= {"vocab_size": files.vocab_size, "sequence_length": config.sequence_length}
    counts |= {"read_records": collector.read, "truncated": collector.truncated}
    counts |= {f"dropped_{reason}": count for reason, count in collector.losses.items()}
    record = {"counts": counts, "sources": sources}
    (output / "instructions.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    write_preview(shown, output)
    report(shown)
    if collector.unended:
        what = "conversations do not end in a special token, so a model may not learn where to stop"
        logger.warning("%d %s; look at the preview", collector.unended, what)
    log_splits(config, splits, counts, section="instructions", unit="conversation")
    return StepResult(
        kind="instructions",
        counts=counts,
        metrics={"fill": fill},
        metadata={
            "dtype": dtype.name,
            "pad_token_id": padding,
            "eos_token_id": eos,
            "ignore_index": IGNORE,
            "train_on": config.train_on,
            "template": template.describe(),
        },
    )


def _read_sources(
    config: InstructionsConfig, collector: _Collector, corpus: Manifest | None, scratch: Path
) -> list[dict[str, Any]]:
    """Read every source; returns what `instructions.json` says about each."""
    reports: dict[int, dict[str, Any]] = {}
    for number, source in in_reading_order(config.source):
        logger.info("reading %s", source.label)
        before, lost, skipped = collector.read, collector.losses, Counter[str]()
        if isinstance(source, InstalledDocsQuestions):
            for pair in read_questions(source, config, corpus, skipped):
                messages = list(pair.messages)
                if config.system is not None:
                    messages.insert(0, Message("system", config.system))
                try:
                    collector.add(messages, number, pair.split)
                except BadRecord as problem:
                    if problem.reason != "special_token":
                        collector.refuse(pair.place, problem)
                    else:  # the documentation of a tokenizer may; nobody can mend that
                        collector.skip(problem)
        else:
            # Closed here, so that an error ends downloads and open files now and not at the next garbage collection.
            with closing(read_source(source, scratch)) as records:
                for place, value in records:
                    collector.take(value, place, number, source)
                    events.progress(f"records from {source.label}", collector.read - before)
        collector.flush()
        dropped = dict(sorted((collector.losses - lost).items()))
        reports[number] = {
            "type": source.type,
            "records": collector.read - before,
            "dropped": dropped,
            "skipped": dict(sorted(skipped.items())),
        }
        logger.info("%s: %d records, dropped %s", source.label, collector.read - before, dropped or "none")
    return [reports[number] for number in sorted(reports)]


def _pack(
    config: InstructionsConfig, output: Path, splits: dict[str, SplitWriter], padding: int, files: TokenizerFiles
) -> tuple[dict[str, int], list[Shown], float]:
    """Write the arrays of every split; returns counts, what to preview, and the fill of the training rows."""
    counts: dict[str, int] = {}
    shown: list[Shown] = []
    fill = 0.0
    for name, split in splits.items():
        split.file.flush()
        packed = write_rows(split.store, output / name, config.sequence_length + 1, padding, config.seed)
        np.save(output / f"{name}.places.npy", packed.places)
        np.save(output / f"{name}.targets.npy", packed.targets)
        tokens = int(packed.places[:, 2].sum())
        counts |= {
            f"{name}_conversations": split.size,
            f"{name}_rows": packed.rows,
            f"{name}_tokens": tokens,
            f"{name}_targets": int(packed.targets.sum()),
        }
        if name == "train":
            fill = tokens / max(1, packed.rows * (config.sequence_length + 1))
        if packed.rows:
            rows = InstructionRows(
                *(np.load(output / f"{name}.{part}.npy", mmap_mode="r") for part in ("tokens", "loss_mask")),
                *(np.load(output / f"{name}.{part}.npy") for part in ("documents", "places", "targets")),
            )
            decode = lambda ids: files.encoder.decode(ids, skip_special_tokens=False)  # noqa: E731
            shown += show(rows, name, config.preview_conversations, decode)
    return counts, shown, fill
