"""The runs that the fine-tuning benchmark compares, each in a process of its own.

    python -m tests.benchmarks._finetuning_peers PEER MODE FOLDER STEPS

PEER is `ours`, `trl_padded`, `trl_bfd` or `trl_bfd_by_row`, or to check the losses `ours_as_` and the name of one of
TRL's, which learns from the conversations that the other one said it had in each step. MODE is `check` or `turns` of
`_turns.measure`. A timed peer leaves the tokens of each of its steps in FOLDER.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from modelmill.components.core.manifest import Manifest
from modelmill.components.data.instruction_packing import place_items
from modelmill.components.data.instruction_rows import IGNORE, InstructionBatch, InstructionRows, open_instructions
from modelmill.components.finetuning.config import AdapterConfig
from modelmill.components.training.config import TrainingConfig
from modelmill.components.training.pretrained import load_causal_lm
from tests.benchmarks._turns import Losses, Records, measure

if TYPE_CHECKING:
    from torch import Tensor, nn

    from modelmill.components.training.feed import WeightedBatches

ROW, ROWS, CONVERSATIONS = 512, 2, 8  # tokens of a packed row; packed rows and padded conversations of a step
SEED = 1
ADAPTER = AdapterConfig(rank=16, alpha=32.0)
Conversation = tuple[list[int], list[int]]
"""Ids, and labels as TRL has them: the id itself, or `IGNORE`."""


def training_config(steps: int, rows: int = ROWS) -> TrainingConfig:
    """The same for all: the peers take the numbers from here."""
    return TrainingConfig.model_validate(
        {
            "steps": steps,
            "global_batch_size": rows,
            "micro_batch_size": rows,
            "parallel": {"processes_per_node": 1},
            "learning_rate": 1e-3,
            "min_learning_rate": 1e-4,
            "warmup_steps": 3,
            "weight_decay": 0.0,
            "log_every": 10,
            "validate_every": None,
            "validation_rows": 0,
            "checkpoint_every": None,
            "accelerator": "cpu",
            "seed": SEED,
        }
    )


def instructions_in(folder: Path) -> Manifest:
    return Manifest.model_validate_json((folder / "instructions.json").read_bytes())


def conversations_of(rows: InstructionRows) -> list[Conversation]:
    """The prepared conversations one by one, in an order in which their lengths are mixed."""
    found = []
    for row, first, length, _ in np.random.default_rng(SEED).permutation(rows.places).tolist():
        part = slice(first, first + length)
        ids = rows.tokens[row, part].tolist()
        learnt = rows.loss_mask[row, part].tolist()
        found.append((ids, [number if mine else IGNORE for number, mine in zip(ids, learnt, strict=True)]))
    return found


class TheirBatches:
    """The conversations of each step of another peer, packed."""

    def __init__(self, steps: Sequence[Sequence[Conversation]]) -> None:
        self._rows = [_packed(conversations) for conversations in steps]

    def batch(self, step: int, rank: int, world: int) -> np.ndarray:
        return self._rows[step]

    def targets(self, step: int) -> int:
        return int((self._rows[step][:, 1] != IGNORE).sum())


def _packed(conversations: Sequence[Conversation]) -> np.ndarray:
    """Rows [b, 3, ROW - 1] as the loop takes them; every conversation keeps to itself."""
    from modelmill.components.finetuning.causal_lm import stack_rows

    lengths = np.array([len(ids) for ids, _ in conversations])
    rows, starts, count = place_items(lengths, ROW, seed=0)
    tokens = np.zeros((count, ROW), np.int64)
    labels = np.full_like(tokens, IGNORE)
    documents = np.full_like(tokens, len(conversations))
    for number, (ids, learnt) in enumerate(conversations):
        part = rows[number], slice(starts[number], starts[number] + len(ids))
        tokens[part], labels[part], documents[part] = ids, learnt, number
    return stack_rows(InstructionBatch(tokens[:, :-1], labels[:, 1:], documents[:, :-1]))


def run_ours(folder: Path, steps: int, records: Records, *, like: str | None = None) -> None:
    import torch

    from modelmill.components.data.loader import BatchSource
    from modelmill.components.finetuning import adapters, causal_lm
    from modelmill.components.finetuning.packed_attention import attend_by_conversation
    from modelmill.components.training.accelerator import CPU
    from modelmill.components.training.checkpoint import Checkpoints
    from modelmill.components.training.journal import Journal
    from modelmill.components.training.loop import TrainingData, TrainingLoop
    from modelmill.components.training.mesh import Mesh
    from modelmill.components.training.worker import RankContext, StopSignal

    torch.use_deterministic_algorithms(True)  # as the engine runs; the peers run as they come
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Conversations of another peer may take a row more than it had; they stay one micro-batch, with one loss.
    config = training_config(steps, ROWS if like is None else CONVERSATIONS)
    batches: WeightedBatches
    if like is None:
        rows = open_instructions(instructions_in(folder), "train")
        batches = causal_lm.SupervisedBatches(rows, SEED, ROWS)
        held = np.bincount(rows.places[:, 0], rows.places[:, 2], len(rows))
        order = BatchSource(rows.tokens, SEED, ROWS)
        _leave(folder, "ours", [int(held[order.indices(step)].sum()) for step in range(steps)])
    else:
        batches = TheirBatches(json.loads((folder / f"{like}.conversations.json").read_bytes()))

    def objective(model: nn.Module, rows: Tensor) -> Tensor:
        loss = causal_lm.supervised_loss(model, rows)
        records.loss(loss)
        return loss

    model = load_causal_lm(folder / "model", dtype=torch.float32, parameter="base")
    attend_by_conversation(model)
    adapters.add_adapters(model, ADAPTER, dora=False, seed=SEED)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        loop = TrainingLoop(
            model=causal_lm.SupervisedModel(model),
            objective=objective,
            data=TrainingData(batches, np.empty((0, 3, ROW - 1), np.int64), np.empty(0, np.int64)),
            config=config,
            ranks=RankContext(0, 1, Mesh(), torch.device("cpu"), CPU(), StopSignal(1), scratch),
            checkpoints=Checkpoints(scratch / "checkpoints", digest="", keep=1, rank=0, world_size=1),
            journal=Journal(scratch / "history.jsonl", steps, enabled=True),
        )
        records.watch(loop.optimizer)
        loop.run()


def run_trl(folder: Path, steps: int, records: Records, *, packing: bool, passes: int = 1) -> None:
    """TRL's trainer; a step takes all of its rows together, or one of `passes` parts after the other."""
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from modelmill.components.training.optimizer import make_optimizer
    from modelmill.components.training.schedule import learning_rate

    config, size = training_config(steps), ROWS if packing else CONVERSATIONS
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(folder / "adapter"), is_trainable=True)
    optimizer = make_optimizer(model, config)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, config) / config.learning_rate
    )
    conversations = conversations_of(open_instructions(instructions_in(folder), "train"))
    columns = {"input_ids": [ids for ids, _ in conversations], "labels": [labels for _, labels in conversations]}

    class Recording(SFTTrainer):
        parts: ClassVar[list[Tensor]] = []

        def compute_loss(self, *arguments: Any, **options: Any) -> Any:
            loss = super().compute_loss(*arguments, **options)
            self.parts.append(loss.detach())
            if len(self.parts) == passes:
                records.loss(torch.stack(self.parts).sum())
                self.parts.clear()
            return loss

    with tempfile.TemporaryDirectory() as name:
        arguments = SFTConfig(
            output_dir=name,
            max_steps=steps,
            max_length=ROW,
            packing=packing,
            packing_strategy="bfd",
            per_device_train_batch_size=size // passes,
            gradient_accumulation_steps=passes,
            gradient_checkpointing=False,
            bf16=False,
            max_grad_norm=config.clip_norm,
            logging_steps=config.log_every,
            train_sampling_strategy="sequential",
            shuffle_dataset=packing,  # the first of TRL's packed rows hold the longest conversations
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer = (Recording if isinstance(records, Losses) else SFTTrainer)(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict(columns),
            processing_class=AutoTokenizer.from_pretrained(str(folder / "tokenizer")),
            optimizers=(optimizer, scheduler),
        )
        rows = trainer.train_dataset
        batches = [
            [_parts(row) for row in rows.select(range(step * size, step * size + size))] for step in range(steps)
        ]
        peer = "trl_padded" if not packing else "trl_bfd" if passes == 1 else "trl_bfd_by_row"
        _leave(folder, peer, [sum(len(ids) for row in batch for ids, _ in row) for batch in batches])
        if isinstance(records, Losses):
            steps_of = [[conversation for row in batch for conversation in row] for batch in batches]
            (folder / f"{peer}.conversations.json").write_text(json.dumps(steps_of))
        records.watch(optimizer)
        trainer.train()


def _parts(row: dict[str, list[int]]) -> list[Conversation]:
    """The conversations of a row of TRL's data set."""
    ends = np.cumsum(row.get("seq_lengths") or [len(row["input_ids"])]).tolist()
    spans = zip([0, *ends], ends, strict=False)
    return [(row["input_ids"][first:last], row["labels"][first:last]) for first, last in spans]


def _leave(folder: Path, peer: str, tokens: list[int]) -> None:
    """Real tokens of each step, prompts and answers; padding is none."""
    (folder / f"{peer}.tokens.json").write_text(json.dumps(tokens))


RUNNERS: dict[str, Callable[[Path, int, Records], None]] = {
    "ours": run_ours,
    "trl_padded": partial(run_trl, packing=False),
    "trl_bfd": partial(run_trl, packing=True),
    "trl_bfd_by_row": partial(run_trl, packing=True, passes=ROWS),
    "ours_as_trl_padded": partial(run_ours, like="trl_padded"),
    "ours_as_trl_bfd": partial(run_ours, like="trl_bfd"),
    "ours_as_trl_bfd_by_row": partial(run_ours, like="trl_bfd_by_row"),
}


def worker(peer: str, mode: str, folder: Path, steps: int) -> None:
    """Run one peer in this process."""
    import transformers

    transformers.logging.set_verbosity_error()
    measure(RUNNERS[peer], mode, folder, steps)


if __name__ == "__main__":
    worker(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
