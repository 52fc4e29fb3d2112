"""Step `score_answers`: how likely a model finds the reference answers of prepared conversations."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from modelmill.components.core import events
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest, json_digest
from modelmill.components.core.model_folder import digest_of, model_folder
from modelmill.components.core.step import StepResult, step_options
from modelmill.components.evaluation.config import AnswerScoresConfig
from modelmill.components.evaluation.likelihood_scores import Losses, write_losses
from modelmill.components.evaluation.prepared import ChosenConversations, choose_conversations


@step_options(device=True)
def score_answers(config: AnswerScoresConfig, output: Path, *, model: Manifest, instructions: Manifest) -> StepResult:
    """Score the answers that were given, whatever the model would write itself.

    Writes `scores.jsonl` (see `records`) with `answer_loss` (nats a target token) and `answer_bits_per_byte` of each
    conversation. Targets are those of training: with `train_on: assistant` every turn of the assistant with its end
    of turn. Bytes are the UTF-8 of the text that the targets decode to, special tokens left out. The metrics of the
    manifest are of all targets together, so that long answers weigh more, with `_lower` and `_upper` of a bootstrap
    over the conversations; `_mean` is the mean over conversations, which the gate compares.

    Args:
        config: which conversations, and how intervals are drawn.
        output: an empty folder.
        model: manifest of an exported model with its tokenizer (`model/`).
        instructions: manifest of `prepare_instructions` with that tokenizer.

    Returns:
        kind `scores`; counts `examples`, `tokens`, `bytes`; metadata `weights_digest`, `dataset_digest`, `scoring`.

    Raises:
        UserError: the split is empty, another tokenizer made the rows, a conversation is longer than the model's
            positions, or a loss is not finite.
    """
    # Imported here, so that a reused step does not pay for torch.
    from modelmill.components.evaluation.language_model import load_language_model
    from modelmill.components.evaluation.likelihood import Window, window_losses

    folder = model_folder(model)
    chosen = choose_conversations(instructions, model, config.split, config.max_examples)
    windows = [Window(place, *chosen.tokens(place)) for place in range(len(chosen.ids))]
    events.progress("loading the model")
    judge = load_language_model(folder, config)
    judge.check_vocabulary(chosen.tokenizer.vocab_size)
    longest = max(len(window.tokens) for window in windows) - 1
    if judge.positions is not None and longest > judge.positions:
        raise UserError(
            f"instructions.sequence_length: a conversation has {longest} tokens and the model {judge.positions}"
            " positions; prepare shorter rows"
        )
    nats = window_losses(judge, windows, chosen.ids, config.batch_tokens)
    # A first token has nothing before it and is no target, even where everything is to be learnt.
    losses = Losses(
        ids=chosen.ids,
        digests=[json_digest((messages[-1].content,))[:16] for messages in chosen.messages],
        nats=nats,
        tokens=np.array([int(window.targets[1:].sum()) for window in windows]),
        bytes=_answer_bytes(chosen),
    )
    scoring = {"split": config.split, "train_on": instructions.metadata.get("train_on", "")}
    metadata = {"weights_digest": digest_of(model), "dataset_digest": instructions.digest, "scoring": scoring}
    counts, metrics = write_losses(config, output, "answer", losses, instructions)
    return StepResult("scores", counts, metrics, metadata)


def _answer_bytes(chosen: ChosenConversations) -> np.ndarray:
    """UTF-8 bytes of the targets of each, int64 [n]; at least one."""
    targets = []
    for place in range(len(chosen.ids)):
        tokens, mask = chosen.tokens(place)
        targets.append(tokens[1:][mask[1:]].tolist())
    texts = chosen.tokenizer.encoder.decode_batch(targets, skip_special_tokens=True)
    return np.array([max(1, len(text.encode("utf-8"))) for text in texts])
