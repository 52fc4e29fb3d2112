"""Step `generate`: a model's answers to the prompts of prepared conversations."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelmill.components.core import events, tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest, json_digest
from modelmill.components.core.model_folder import digest_of, model_folder
from modelmill.components.core.step import StepResult, step_options
from modelmill.components.data.instruction_prompts import Prompt, read_prompts
from modelmill.components.evaluation.batching import batches, evenly
from modelmill.components.evaluation.config import GenerateConfig
from modelmill.components.evaluation.prepared import choose_conversations
from modelmill.components.evaluation.records import GENERATIONS_FILE, Generation, write_generations

if TYPE_CHECKING:
    from modelmill.components.evaluation.decoding import Continuation
    from modelmill.components.evaluation.language_model import LanguageModel

logger = logging.getLogger("modelmill")
SAMPLES_FILE = "samples.md"


@step_options(resumable=True, device=True)
def generate(config: GenerateConfig, output: Path, *, model: Manifest, instructions: Manifest) -> StepResult:
    """Answer the last turn of each conversation of a split.

    Writes `generations.jsonl` (see `records`; the reference is the answer that was given) and `samples.md`, some of
    them to read. An answer ends with an end token of the tokenizer, of the model's `generation_config.json` or
    `config.json`, or with the token that closes a turn in the template; none of them, and no other special token, is
    part of it, nor is blank space around it. The model's own settings for sampling are not used.

    A prompt that leaves no room for `max_new_tokens` in the model's positions loses its beginning, and is counted.

    What is drawn depends on seed and example alone. Finished batches are kept beside the output: a step that was
    killed goes on behind them and ends with the same bytes.

    Args:
        config: which conversations, and how answers are chosen.
        output: an empty folder.
        model: manifest of an exported model with its tokenizer (`model/`).
        instructions: manifest of `prepare_instructions` with that tokenizer.

    Returns:
        kind `generations`; counts `examples`, `prompt_tokens`, `generated_tokens`, `truncated` (prompts),
        `unended` (answers that were cut at `max_new_tokens`); metadata `weights_digest`, `dataset_digest`, `split` and
        `decoding`, which `score_generations` hands on, so that the gate compares what was made alike.

    Raises:
        UserError: the split is empty, another tokenizer made the rows, the model has fewer positions than
            `max_new_tokens` or a smaller vocabulary than its tokenizer, or its logits are not finite.
    """
    # Imported here, so that a reused step does not pay for torch.
    from modelmill.components.evaluation.language_model import load_language_model, memory_explained

    folder = model_folder(model)
    chosen = choose_conversations(instructions, model, config.split, config.max_examples)
    wanted = set(chosen.numbers.tolist())
    read = enumerate(read_prompts(instructions, model, config.split))
    prompts = [prompt for number, prompt in read if number in wanted]
    events.progress("loading the model")
    writer = load_language_model(folder, config)
    writer.check_vocabulary(chosen.tokenizer.vocab_size)
    tokens, truncated = _fitted(prompts, writer.positions, config.max_new_tokens)
    ends = _end_tokens(writer, chosen.tokenizer.id_of(chosen.tokenizer.eos), chosen.end_of_turn)
    if not ends:
        logger.warning(
            "neither model nor template has an end token: every answer takes all of generation.max_new_tokens"
        )
    journal = _Journal(output, json_digest([config.model_dump(mode="json"), model.digest, instructions.digest]))
    with memory_explained():
        found = _continue_all(writer, tokens, prompts, config, chosen.tokenizer.vocab_size, ends, journal)
    texts = chosen.tokenizer.encoder.decode_batch([answer.tokens for answer in found], skip_special_tokens=True)
    answered = [
        Generation(prompt.id, prompt.text, (prompt.reference,), text.strip())
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    write_generations(output / GENERATIONS_FILE, answered)
    _write_samples(output / SAMPLES_FILE, answered, config.preview_examples)
    counts = {
        "examples": len(answered),
        "prompt_tokens": sum(map(len, tokens)),
        "generated_tokens": sum(len(answer.tokens) for answer in found),
        "truncated": truncated,
        "unended": sum(not answer.ended for answer in found),
    }
    _tell(output, counts, instructions, config)
    metadata: dict[str, Any] = {"weights_digest": digest_of(model), "dataset_digest": instructions.digest}
    metadata |= {"split": config.split, "decoding": config.decoding()}
    return StepResult("generations", counts, metadata=metadata)


class _Journal:
    """Finished batches, a line each, in a file beside the output; its first line says what they belong to."""

    def __init__(self, output: Path, digest: str) -> None:
        self._path = output.parent / f"{output.name}.batches.jsonl"
        lines = [line for _, line in events.read_lines(self._path)]
        if lines[:1] != [{"of": digest}]:
            self._path.unlink(missing_ok=True)
            events.append_line(self._path, {"of": digest})
        self.batches = {line["batch"]: line["answers"] for line in lines[1:] if lines[0] == {"of": digest}}

    def append(self, batch: int, answers: Sequence[Continuation]) -> None:
        record = [{"tokens": answer.tokens, "ended": answer.ended} for answer in answers]
        events.append_line(self._path, {"batch": batch, "answers": record})
        self.batches[batch] = record


def _continue_all(
    writer: LanguageModel,
    tokens: Sequence[Sequence[int]],
    prompts: Sequence[Prompt],
    config: GenerateConfig,
    vocab_size: int,
    ends: set[int],
    journal: _Journal,
) -> list[Continuation]:
    """Continue every prompt, batch by batch, those aside that the journal has; in the order of the prompts."""
    from modelmill.components.evaluation.decoding import Continuation, continue_batch

    found: dict[int, Continuation] = {}
    planned = batches([len(prompt) for prompt in tokens], config.batch_tokens, config.max_new_tokens)
    began, written = time.monotonic(), 0
    for number, batch in enumerate(planned):
        if number not in journal.batches:
            report = _reporter(len(found), len(tokens), written / (time.monotonic() - began))
            answers = continue_batch(
                writer,
                [tokens[place] for place in batch],
                [prompts[place].id for place in batch],
                config,
                vocab_size=vocab_size,
                end_tokens=ends,
                report=report,
            )
            written += sum(len(answer.tokens) for answer in answers)
            journal.append(number, answers)
        kept = journal.batches[number]
        found |= {place: Continuation(**record) for place, record in zip(batch, kept, strict=True)}
    events.progress("writing answers", len(found), len(tokens))
    if written:
        rate_now = written / (time.monotonic() - began)
        logger.info("%d tokens written, %.0f tokens/s", written, rate_now)
        tracking.log_metrics({"tokens_per_second": rate_now})
    return [found[place] for place in range(len(tokens))]


def _reporter(done: int, total: int, rate: float) -> Callable[[int], None]:
    what = f"writing answers, {rate:.0f} tokens/s" if rate else "writing answers"
    return lambda ended: events.progress(what, done + ended, total)


def _fitted(prompts: Sequence[Prompt], positions: int | None, new: int) -> tuple[list[tuple[int, ...]], int]:
    """Token ids of prompts with room for an answer behind them, and how many lost their beginning for it."""
    for prompt in prompts:
        if not prompt.tokens:
            raise UserError(f"instructions: the prompt of {prompt.id!r} has no token; mend the template")
    if positions is None:
        return [prompt.tokens for prompt in prompts], 0
    room = positions - new
    if room < 1:
        raise UserError(
            f"generation.max_new_tokens: {new} leaves no room for a prompt in the model's {positions} positions;"
            " lower it"
        )
    truncated = sum(len(prompt.tokens) > room for prompt in prompts)
    if truncated:
        logger.warning("%d prompts were longer than %d tokens and lost their beginning", truncated, room)
    return [prompt.tokens[-room:] for prompt in prompts], truncated


def _end_tokens(writer: LanguageModel, *known: int | None) -> set[int]:
    """Every token that ends an answer."""
    named: list[Any] = list(known)
    for settings in (writer.model.generation_config, writer.model.config.get_text_config()):
        ids = getattr(settings, "eos_token_id", None)
        named += ids if isinstance(ids, (list, tuple)) else [ids]
    return {int(token) for token in named if token is not None}


def _write_samples(path: Path, answered: Sequence[Generation], number: int) -> None:
    """Some of the answers as Markdown, each text in a fence that is longer than any in it."""
    parts = ["# Answers\n"]
    for place in evenly(len(answered), number).tolist() if number else []:
        example = answered[place]
        parts.append(f"## {example.id}\n")
        shown = {"prompt": example.prompt, "reference": example.references[0], "answer": example.prediction}
        for name, text in shown.items():
            fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text) or [""]))
            parts.append(f"{name}:\n\n{fence}text\n{text}\n{fence}\n")
    path.write_text("\n".join(parts), encoding="utf-8")


def _tell(output: Path, counts: dict[str, int], instructions: Manifest, config: GenerateConfig) -> None:
    tracking.log_metrics(counts)
    for name in (GENERATIONS_FILE, SAMPLES_FILE):
        tracking.log_artifact(output / name, "generations")
    tracking.log_dataset(
        name=f"instructions-{config.split}",
        digest=instructions.digest,
        source=instructions.uri,
        context=config.split,
        profile={"examples": counts["examples"], "prompt_tokens": counts["prompt_tokens"]},
    )
    logger.info("%s", ", ".join(f"{count} {name}" for name, count in counts.items()))
