"""Step `prepare_preferences`: pairs of answers to one prompt, checked, split, written out and tokenised."""

from __future__ import annotations

import dataclasses
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
from modelmill.components.data.conversations import BadRecord, prompt_digest
from modelmill.components.data.documents import SPLITS
from modelmill.components.data.instruction_rows import IGNORE, InstructionRows
from modelmill.components.data.instruction_sources import in_reading_order, read_source
from modelmill.components.data.preference_config import SECTION, InstalledDocsPairs, PreferencesConfig
from modelmill.components.data.preference_records import Pair, pair_digest, read_documented, read_pair
from modelmill.components.data.preference_rows import write_pairs
from modelmill.components.data.prepared_splits import (
    BATCH_CHARACTERS,
    SplitChooser,
    SplitWriter,
    check_splits,
    log_splits,
)
from modelmill.components.data.preview import Shown, report, show, write_preview
from modelmill.components.data.section_names import told_as
from modelmill.components.data.tokenizer_files import TokenizerFiles, load_tokenizer, span_mask

logger = logging.getLogger("modelmill")
_REASONS = ("duplicate", "in_other_split", "too_long", "unlearnt", "equal_tokens")


class _Split(SplitWriter):
    """One split being written, and the tokens of its longest answer with its prompt."""

    longest = 0

    def append(self, waiting: _Waiting, tokens: list[np.ndarray], masks: list[np.ndarray]) -> None:
        self.write(waiting.identity, waiting.source, waiting.pair.as_dict())
        for ids, mask in zip(tokens, masks, strict=True):
            self.store.append(ids, mask)
            self.longest = max(self.longest, len(ids))


class _Waiting(NamedTuple):
    """A pair on its way into a split: written out and not yet tokenised."""

    pair: Pair
    sides: tuple[Rendered, Rendered]
    source: int
    split: str
    identity: bytes


class _Collector(SplitChooser):
    """Takes pairs one at a time and puts those that are good into their splits; counts the others by reason."""

    def __init__(
        self,
        config: PreferencesConfig,
        tokenizer: TokenizerFiles,
        template: ConversationTemplate,
        splits: dict[str, _Split],
    ) -> None:
        super().__init__(config, SECTION, _REASONS)
        self._config, self._tokenizer, self._template, self._splits = config, tokenizer, template, splits
        self._waiting: list[_Waiting] = []
        self._characters = 0

    def add(self, pair: Pair, source: int, split: str | None) -> None:
        """A pair, to be put into a split or into the one of its prompt's digest.

        Raises:
            BadRecord: the template cannot write it out.
        """
        sides, identity = self._render(pair), pair_digest(pair)
        chosen = self.choose(identity, prompt_digest(pair.conversations[0]), split)
        if chosen is None:
            return
        self._waiting.append(_Waiting(pair, sides, source, chosen, identity))
        self._characters += sum(len(side.text) for side in sides)
        if self._characters >= BATCH_CHARACTERS:
            self.flush()

    def _render(self, pair: Pair) -> tuple[Rendered, Rendered]:
        """Both conversations as text, and of each the place of the last answer alone."""
        sides = []
        for conversation in pair.conversations:
            self._tokenizer.check(conversation)
            rendered = self._template.render(conversation)
            start, end = rendered.spans[-1] if rendered.spans else (0, 0)
            if conversation[-1].content.strip() not in rendered.text[start:end]:
                raise BadRecord("template", "has a last answer that the chat template does not mark as the model's")
            sides.append(Rendered(rendered.text, ((start, end),)))
        chosen, rejected = sides
        if chosen.text[: chosen.spans[0][0]] != rejected.text[: rejected.spans[0][0]]:
            what = "has a prompt that the chat template writes differently for the two answers"
            raise BadRecord("template", f"{what}, so their likelihoods cannot be compared")
        return chosen, rejected

    def flush(self) -> None:
        """Tokenise what waits."""
        texts = [side.text for waiting in self._waiting for side in waiting.sides]
        encoded = self._tokenizer.encoder.encode_batch(texts, add_special_tokens=False)
        for number, waiting in enumerate(self._waiting):
            both = encoded[2 * number : 2 * number + 2]
            tokens = [np.array(one.ids, np.int64) for one in both]
            self._store(waiting, tokens, [span_mask(*args) for args in zip(both, _spans(waiting), strict=True)])
        self._waiting, self._characters = [], 0

    def _store(self, waiting: _Waiting, tokens: list[np.ndarray], masks: list[np.ndarray]) -> None:
        longest = self._config.sequence_length + 1
        cut = any(len(ids) > longest for ids in tokens)
        if cut and self._config.too_long == "drop":
            self.dropped["too_long"] += 1
            return
        tokens, masks = [ids[:longest] for ids in tokens], [mask[:longest] for mask in masks]
        if not all(mask[1:].any() for mask in masks):
            self.dropped["unlearnt"] += 1
        elif np.array_equal(tokens[0], tokens[1]):  # what differed was cut off or is no token
            self.dropped["equal_tokens"] += 1
        else:
            self.truncated += cut
            self.unended += not cut and not all(self._tokenizer.ends_specially(side.text) for side in waiting.sides)
            self._splits[waiting.split].append(waiting, tokens, masks)


def _spans(waiting: _Waiting) -> list[tuple[tuple[int, int], ...]]:
    return [side.spans for side in waiting.sides]


def prepare_preferences(
    config: PreferencesConfig, output: Path, *, tokenizer: Manifest, corpus: Manifest | None = None
) -> StepResult:
    """Write, for each split, its pairs and their tokens with loss masks.

    Of every split (`train`, `validation`, `test`):
        `<split>.jsonl`: one pair a line: `id` (hex digest of its content), `source` (number in the section), `prompt`
            (messages), `chosen` and `rejected` (texts).
        `<split>.tokens.npy`, `.loss_mask.npy`, `.documents.npy`, `.places.npy`, `.targets.npy`: as those of
            `prepare_instructions`, one conversation a row; row 2 i of line i's prompt with the chosen answer, row
            2 i + 1 with the rejected one. Targets are the last answer with its end of turn.
    And `preferences.json` (counts by source and reason), `preview.txt` and `preview.html`.
    `preference_rows` reads them. Equal inputs give equal bytes.

    Args:
        config: sources, template, split and row length.
        output: existing empty folder.
        tokenizer: manifest of `train_tokenizer`, or of an exported model with its tokenizer.
        corpus: manifest of the `ingest_corpus` that pretraining read; `installed-docs-qa` asks in the test only about
            what it held out.

    Returns:
        kind `preferences`; counts `vocab_size`, `sequence_length`, per split `_pairs`, `_rows` (two a pair),
        `_tokens` (padding excluded), `_targets`, `_longest` (tokens); `read_records`, `truncated`,
        `dropped_<reason>`; metadata `dtype`, `pad_token_id`, `eos_token_id`, `ignore_index` and `template`.

    Raises:
        UserError: a source cannot be read, more records are bad than allowed, the tokenizer has no chat template and
            none is given, or a split stays empty.
    """
    files = load_tokenizer(tokenizer)
    with told_as(SECTION, instead_of="instructions"):
        template = make_template(config.as_instructions(), files)
    pad, eos = files.id_of(files.pad), files.id_of(files.eos)
    padding = pad if pad is not None else eos if eos is not None else 0  # never seen by the loss
    dtype = np.dtype("<u2" if files.vocab_size <= 1 << 16 else "<u4")
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=output.parent, prefix="preferences-")))
        splits = {name: _Split(output, scratch, name, dtype, stack) for name in SPLITS}
        collector = _Collector(config, files, template, splits)
        sources = _read_sources(config, collector, corpus, scratch)
        check_splits(config, collector, splits, section=SECTION, unit="pair", more="pairs")
        counts, shown = _write(config, output, splits, padding, files)
    counts |= {"vocab_size": files.vocab_size, "sequence_length": config.sequence_length}
    counts |= {"read_records": collector.read, "truncated": collector.truncated}
    counts |= {f"dropped_{reason}": count for reason, count in collector.losses.items()}
    record = {"counts": counts, "sources": sources}
    (output / "preferences.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    write_preview(shown, output)
    report(shown)
    if collector.unended:
        what = "pairs have an answer that does not end in a special token, so a model may not learn where to stop"
        logger.warning("%d %s; look at the preview", collector.unended, what)
    log_splits(config, splits, counts, section=SECTION, unit="pair")
    metadata = {"dtype": dtype.name, "pad_token_id": padding, "eos_token_id": eos, "ignore_index": IGNORE}
    return StepResult("preferences", counts, metadata={**metadata, "template": template.describe()})


def _read_sources(
    config: PreferencesConfig, collector: _Collector, corpus: Manifest | None, scratch: Path
) -> list[dict[str, Any]]:
    """Read every source; returns what `preferences.json` says about each."""
    reports: dict[int, dict[str, Any]] = {}
    for number, source in in_reading_order(config.source):
        logger.info("reading %s", source.label)
        before, lost, skipped = collector.read, collector.losses, Counter[str]()
        if isinstance(source, InstalledDocsPairs):
            for place, pair, split in read_documented(source, config, corpus, skipped):
                collector.read += 1
                try:
                    collector.add(pair, number, split)
                except BadRecord as problem:
                    if problem.reason != "special_token":
                        collector.bad.refuse(place, problem)
                    else:  # the documentation of a tokenizer may; nobody can mend that
                        collector.dropped[problem.reason] += 1
        else:
            with told_as(SECTION, instead_of="instructions"), closing(read_source(source, scratch)) as records:
                for place, value in records:
                    collector.read += 1
                    try:
                        collector.add(read_pair(value, source.records, config.system), number, source.into)
                    except BadRecord as problem:
                        collector.bad.refuse(place, problem)
                    events.progress(f"pairs from {source.label}", collector.read - before)
        collector.flush()
        reports[number] = {
            "type": source.type,
            "records": collector.read - before,
            "dropped": dict(sorted((collector.losses - lost).items())),
            "skipped": dict(sorted(skipped.items())),
        }
        logger.info("%s: %d records, dropped %s", source.label, collector.read - before, reports[number]["dropped"])
    return [reports[number] for number in sorted(reports)]


def _write(
    config: PreferencesConfig, output: Path, splits: dict[str, _Split], padding: int, files: TokenizerFiles
) -> tuple[dict[str, int], list[Shown]]:
    """Write the arrays of every split; returns counts and what to preview."""
    counts: dict[str, int] = {}
    shown: list[Shown] = []
    for name, split in splits.items():
        split.file.flush()
        rows = write_pairs(split.store, output / name, config.sequence_length + 1, padding)
        counts |= {
            f"{name}_pairs": split.size,
            f"{name}_rows": len(rows),
            f"{name}_tokens": int(rows.places[:, 2].sum()),
            f"{name}_targets": int(rows.targets.sum()),
            f"{name}_longest": split.longest,
        }
        shown += _show(rows, name, config.preview_pairs, files)
    return counts, shown


def _show(rows: InstructionRows, name: str, pairs: int, files: TokenizerFiles) -> list[Shown]:
    decode = lambda ids: files.encoder.decode(ids, skip_special_tokens=False)  # noqa: E731
    shown = []
    for number, conversation in enumerate(show(rows, name, 2 * pairs, decode)):
        side = "rejected" if number % 2 else "chosen"
        title = f"{name}, pair {number // 2 + 1}, {side}:{conversation.title.partition(':')[2]}"
        shown.append(dataclasses.replace(conversation, title=title))
    return shown
