"""What a precision makes of a model, and that stochastic rounding trains as fp32 does where bf16 alone lags."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelmill.components.llama.config import LlamaConfig
from modelmill.components.llama.model import LlamaDecoder
from modelmill.components.training.adamw import AdamW
from modelmill.components.training.config import Precision
from modelmill.components.training.estimate import estimate_memory
from modelmill.components.training.loop import TrainingLoop
from modelmill.components.training.optimizer import make_optimizer
from modelmill.components.training.precision import autocast, precision_policy, set_precision
from tests.components.training.layouts import Scenario, make
from tests.components.training.runs import single_rank
from tests.components.training.samples import MODEL, VOCAB, make_tokens, training_config

WEIGHTS: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16-mixed": torch.float32,
    "bf16-stochastic": torch.bfloat16,
    "fp8-mixed": torch.float32,
}


@pytest.mark.parametrize("precision", list(WEIGHTS))
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_parameters_get_the_dtype_of_the_precision(precision: Precision, device: str) -> None:
    config = LlamaConfig.model_validate({**MODEL, "vocab_size": VOCAB, "tie_embeddings": True})
    model = LlamaDecoder(config, device=device, dtype=torch.float16)
    names = [name for name, _ in model.named_parameters()]
    set_precision(model, precision)
    expected = torch.float16 if precision == "fp32" else WEIGHTS[precision]  # fp32 leaves a model as it was built
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert {parameter.device.type for parameter in model.parameters()} == {device}
    assert [name for name, _ in model.named_parameters()] == names
    assert model.output_weight is model.embedding.weight


def test_other_parameters_and_buffers_stay() -> None:
    model = nn.Module()
    model.table = nn.Parameter(torch.arange(4), requires_grad=False)
    model.register_buffer("mean", torch.zeros(3))
    model.weight = nn.Parameter(torch.zeros(3))
    set_precision(model, "bf16-stochastic")
    assert (model.table.dtype, model.mean.dtype, model.weight.dtype) == (torch.int64, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("precision", list(WEIGHTS))
def test_products_run_in_the_precision(precision: Precision) -> None:
    policy = precision_policy(precision)
    linear = nn.Linear(4, 4).to(policy.weights)
    with autocast(precision, "cpu"):
        output = linear(torch.ones(2, 4, dtype=policy.weights))
    assert output.dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)
    assert isinstance(autocast(precision, "cpu"), nullcontext) is (policy.autocast is None)
    output.sum().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.dtype == policy.weights
    assert policy.stochastic_rounding is (precision == "bf16-stochastic")
    assert policy.float8 is (precision == "fp8-mixed")


@pytest.mark.parametrize("precision", list(WEIGHTS))
@pytest.mark.parametrize("state", ["fp32", "8bit"])
def test_a_step_holds_what_is_estimated(precision: Precision, state: str) -> None:
    """Weights, gradients and moments to the byte; 8-bit moments but for vectors and the last block of a matrix."""
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 352, "num_layers": 3, "num_heads": 4}
    config = LlamaConfig.model_validate({**sizes, "max_sequence_length": 32})
    training = training_config(precision=precision, optimizer_state=state, parallel={"processes_per_node": 1})
    model = LlamaDecoder(config)
    set_precision(model, precision)
    optimizer = make_optimizer(model, training)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    expected = estimate_memory(config, training, 32)
    parameters = list(model.parameters())
    assert expected.weights == sum(parameter.nbytes for parameter in parameters)
    assert expected.gradients == sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)
    held = sum(v.nbytes for kept in optimizer.state.values() for key, v in kept.items() if key != "step")
    assert held == (expected.optimizer if state == "fp32" else pytest.approx(expected.optimizer, rel=0.01))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainingLoop]:
    """The sample model after the same steps in three precisions; `plain` is bf16 with torch's AdamW."""
    root = tmp_path_factory.mktemp("precision")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELMILL_HOME", str(root / "home"))
        tokens = make_tokens(root / "tokens")
        return {
            name: _run(tokens, root, name, precision, dtype)
            for name, precision, dtype in (
                ("fp32", "fp32", "float32"),
                ("plain", "fp32", "bfloat16"),
                ("stochastic", "bf16-stochastic", "float32"),
                ("again", "bf16-stochastic", "float32"),
            )
        }


def _run(tokens: Any, root: Path, name: str, precision: str, dtype: str) -> TrainingLoop:
    fields = {"precision": precision, "steps": 50, "schedule": "wsd", "constant_steps": None, "validate_every": None}
    fields |= {"learning_rate": 2e-3, "min_learning_rate": 2e-4, "checkpoint_every": None, "log_every": 50}
    scenario = Scenario(name, {"processes_per_node": 1}, fields, dtype)
    loop = make(scenario, tokens, single_rank(root / name), root)
    loop.run()
    return loop


def _weights(loop: TrainingLoop) -> Tensor:
    return torch.cat([parameter.detach().float().flatten() for parameter in loop.model.parameters()])


def test_stochastic_rounding_ends_where_fp32_does_and_rounding_to_nearest_does_not(
    trained: dict[str, TrainingLoop],
) -> None:
    assert isinstance(trained["stochastic"].optimizer, AdamW)
    for name in ("plain", "stochastic"):
        assert {parameter.dtype for parameter in trained[name].model.parameters()} == {torch.bfloat16}
    for metric in ("loss", "validation_loss"):
        values = {name: loop.journal.latest[metric] for name, loop in trained.items()}
        assert values["plain"] > values["fp32"] + 0.05
        assert abs(values["stochastic"] - values["fp32"]) < 0.2 * (values["plain"] - values["fp32"])
    exact = _weights(trained["fp32"])
    distance = {name: (_weights(loop) - exact).norm().item() for name, loop in trained.items()}
    assert distance["stochastic"] < 0.6 * distance["plain"]


def test_stochastic_rounding_repeats_itself(trained: dict[str, TrainingLoop]) -> None:
    first, again = (_weights(trained[name]) for name in ("stochastic", "again"))
    assert torch.equal(first, again)
