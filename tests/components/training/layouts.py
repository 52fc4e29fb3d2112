"""Training runs on layouts of the ranks of one launch, and the same runs for one rank in the test's process."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modelmill.components.core.manifest import Manifest
from modelmill.components.data.loader import BatchSource, open_rows
from modelmill.components.llama.config import LlamaConfig
from modelmill.components.llama.model import LlamaDecoder
from modelmill.components.llama.pretrain import next_token_loss
from modelmill.components.training import checkpoint
from modelmill.components.training.checkpoint import Progress
from modelmill.components.training.config import TrainingConfig
from modelmill.components.training.launch import TrainingResult
from modelmill.components.training.layout import ParallelConfig
from modelmill.components.training.loop import Objective, TrainingLoop
from modelmill.components.training.mesh import Mesh
from modelmill.components.training.prepare import prepare
from modelmill.components.training.worker import RankContext, run_rank
from tests.components.training.runs import assemble
from tests.components.training.samples import LENGTH, MODEL, training_config

MODULE = "tests.components.training.layouts"
VOCAB = 98  # even, so that two ranks can share it, and not a multiple of 4, so that FSDP's parts are uneven
STEPS = 10


@dataclass(frozen=True)
class Scenario:
    """One run.

    Attributes:
        name: of its folder.
        parallel: the layout, on all ranks of the launch.
        training: fields of the training section that are not the samples'.
        dtype: of the weights.
        model: `llama`, or a kind of transformers model.
        resume: another run of these tests, whose checkpoint in the middle this one starts from.
    """

    name: str
    parallel: dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float64"
    model: str = "llama"
    resume: str | None = None

    def config(self) -> TrainingConfig:
        """Few steps with one checkpoint in the middle, every step logged, and no accumulation unless asked for."""
        parallel = ParallelConfig.model_validate(self.parallel)
        base = {"steps": STEPS, "validate_every": STEPS // 2, "checkpoint_every": STEPS // 2, "constant_steps": 2}
        base |= {"micro_batch_size": 8 // parallel.data_degree}
        return training_config(**{**base, **self.training, "parallel": self.parallel})


def transformers_loss(model: nn.Module, rows: Tensor) -> Tensor:
    logits = model(rows[:, :-1]).logits
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)), rows[:, 1:].flatten()
    )


def build(scenario: Scenario, ranks: RankContext, config: TrainingConfig) -> tuple[nn.Module, Objective]:
    """A model with the same weights on every layout."""
    dtype = getattr(torch, scenario.dtype)
    if scenario.model == "llama":
        model = LlamaDecoder(LlamaConfig.model_validate({**MODEL, "vocab_size": VOCAB}), device="meta", dtype=dtype)
        prepare(model, ranks, config)
        model.to_empty(device=ranks.device)
        model.init_weights(config.seed)
        return model, next_token_loss
    torch.manual_seed(0)
    loaded = transformers_model(scenario.model).to(dtype)
    prepare(loaded, ranks, config)
    return loaded, transformers_loss


def transformers_model(kind: str) -> nn.Module:
    """A small causal language model with random weights, as if it had been loaded."""
    import transformers

    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": LENGTH}
    if kind == "gpt_neox":
        return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes, hidden_dropout=0.0))
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config)


def make(scenario: Scenario, tokens: Manifest, ranks: RankContext, root: Path) -> TrainingLoop:
    """The loop of a run in its folder below `root`; the ranks' mesh becomes the scenario's."""
    config = scenario.config()
    ranks.scratch = root / scenario.name
    if ranks.world_size > 1:
        ranks.mesh = Mesh.build(config.parallel, "cpu")
    if ranks.rank == 0:
        (ranks.scratch / "checkpoints").mkdir(parents=True)
        if scenario.resume:
            name = f"step-{STEPS // 2:08d}"
            shutil.copytree(root / scenario.resume / "checkpoints" / name, ranks.scratch / "checkpoints" / name)
    if ranks.world_size > 1:
        dist.barrier()
    model, objective = build(scenario, ranks, config)
    batches = BatchSource(open_rows(tokens, "train"), config.seed, config.global_batch_size)
    return assemble(model, objective, batches, tokens, config, ranks)


def whole(tensor: Tensor) -> Tensor:
    """All of a distributed tensor, on every rank."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def run(scenario: Scenario, tokens: Manifest, ranks: RankContext, root: Path) -> dict[str, Any]:
    """Train, and say what this rank held and what the first gradient was, before it was clipped."""
    loop = make(scenario, tokens, ranks, root)
    found: dict[str, Any] = {
        "held": sum(
            parameter.to_local().numel() if hasattr(parameter, "to_local") else parameter.numel()
            for parameter in loop.model.parameters()
        ),
        "kind": type(loop.wrapped).__name__,
    }
    loop.run()
    return found


def first_gradient(scenario: Scenario, tokens: Manifest, ranks: RankContext, root: Path) -> dict[str, list[float]]:
    """The gradient of the first global batch by parameter, as the optimizer gets it, not clipped; told by rank 0."""
    short = {**scenario.training, "clip_norm": None, "steps": 4, "validation_rows": 0}
    loop = make(replace(scenario, training=short), tokens, ranks, root)
    found: dict[str, list[float]] = {}

    def keep(*_: Any) -> None:
        for name, parameter in loop.model.named_parameters():
            if parameter.grad is not None:
                found.setdefault(name, whole(parameter.grad).flatten().tolist())

    loop.optimizer.register_step_pre_hook(keep)
    loop.run()
    return found if ranks.is_main else {}


def failing_save(scenario: Scenario, tokens: Manifest, ranks: RankContext, root: Path) -> dict[str, Any]:
    """What each rank raises, and what lies on the disk, when the last rank's disk is full."""
    loop = make(scenario, tokens, ranks, root)
    loop.checkpoints.save(Progress(1, 1), loop.model, loop.optimizer)
    original: Callable[..., Any] = checkpoint._save
    if ranks.rank == ranks.world_size - 1:

        def full(tensors: dict[str, Tensor], path: Path) -> dict[str, Any]:
            original(tensors, path)
            raise OSError(28, "No space left on device", str(path))

        checkpoint._save = full
    try:
        loop.checkpoints.save(Progress(2, 2), loop.model, loop.optimizer)
        raised = None
    except OSError as error:
        raised = [error.errno, str(error)]
    finally:
        checkpoint._save = original
    dist.barrier()
    left = sorted(path.name for path in (ranks.scratch / "checkpoints").iterdir())
    loop.checkpoints.save(Progress(3, 3), loop.model, loop.optimizer)
    if ranks.rank == 0:
        damaged = ranks.scratch / "checkpoints" / "step-00000003" / f"model-{ranks.world_size - 1}.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x55")
    dist.barrier()
    loaded = loop.checkpoints.load_latest(loop.model, loop.optimizer)
    return {"raised": raised, "left": left, "loaded": loaded.step}


TASKS: dict[str, Callable[[Scenario, Manifest, RankContext, Path], dict[str, Any]]] = {
    "run": run,
    "first_gradient": first_gradient,
    "failing_save": failing_save,
}


def measure(ranks: RankContext, spec: dict[str, Any], training: TrainingConfig) -> TrainingResult:
    """Every task of the launch, and what every rank found."""
    tokens, root = Manifest.model_validate(spec["tokens"]), Path(spec["root"])
    found = {}
    for task, fields in spec["tasks"]:
        scenario = Scenario(**fields)
        found[scenario.name] = TASKS[task](scenario, tokens, ranks, root)
    every: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(every, found)
    return TrainingResult(metadata={"ranks": every})


def as_spec(tasks: list[tuple[str, Scenario]]) -> list[tuple[str, dict[str, Any]]]:
    """Tasks as JSON."""
    return [(task, asdict(scenario)) for task, scenario in tasks]


if __name__ == "__main__":
    run_rank(measure, sys.argv)
