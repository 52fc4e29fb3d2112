"""litgpt's training loop as a peer, run by an environment of its own (`make bench-peers`): it wants another
huggingface_hub than the rest.

    python -m tests.benchmarks._litgpt_peer litgpt MODE FOLDER STEPS

The loop is `litgpt.pretrain.fit` as it is. Optimizer and learning rates are those of the other peers: litgpt decays
norm weights and starts warmup at zero, which would make it another computation. `torch.compile`, which
`litgpt.pretrain.main` adds, is left out: on a CPU it warms up for half a minute and gains nothing at this size.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning
import litgpt.pretrain
import numpy as np
import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.model import GPT, Config
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from safetensors.torch import load_file

from tests.benchmarks._turns import Losses, Records, measure


def build(folder: Path, length: int) -> GPT:
    """litgpt's model with the weights of the benchmark's Hugging Face folder."""
    sizes = json.loads((folder / "model" / "config.json").read_text())
    config = Config(
        block_size=length,
        padded_vocab_size=sizes["vocab_size"],
        n_layer=sizes["num_hidden_layers"],
        n_head=sizes["num_attention_heads"],
        n_query_groups=sizes["num_key_value_heads"],
        n_embd=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        norm_eps=sizes["rms_norm_eps"],
        rope_base=int(sizes["rope_theta"]),
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    model, weights = GPT(config), {}
    copy_weights_hf_llama(config, {}, weights, load_file(folder / "model" / "model.safetensors"))
    model.load_state_dict(weights)
    return model


def run(folder: Path, steps: int, records: Records) -> None:
    """Train with litgpt."""
    settings = json.loads((folder / "settings.json").read_text())
    rows = np.load(folder / "rows.npy", mmap_mode="r")
    batch, length = rows.shape[1], rows.shape[2] - 1
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="32-true")
    model = build(folder, length)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings["weight_decay"]}, {"params": plain, "weight_decay": 0.0}],
        lr=settings["learning_rates"][0],
        betas=settings["betas"],
        eps=settings["eps"],
        fused=True,
    )
    rates = iter(settings["learning_rates"])

    def set_rate(*_: Any) -> None:
        rate = next(rates)
        for group in optimizer.param_groups:
            group["lr"] = rate

    optimizer.register_step_pre_hook(set_rate)
    records.watch(optimizer)
    if isinstance(records, Losses):
        entropy = litgpt.pretrain.chunked_cross_entropy

        def recorded(*arguments: Any, **options: Any) -> torch.Tensor:
            loss = entropy(*arguments, **options)
            if torch.is_grad_enabled() and loss.device.type != "meta":  # not the validation, not the count of FLOPs
                records.loss(loss.detach())
            return loss

        litgpt.pretrain.chunked_cross_entropy = recorded
    data = torch.utils.data.DataLoader(Rows(rows, steps), batch_size=batch)
    state = {"model": fabric.setup(model), "optimizer": fabric.setup_optimizers(optimizer)}
    train = TrainArgs(
        save_interval=None,
        log_interval=10,
        global_batch_size=batch,
        micro_batch_size=batch,
        lr_warmup_steps=1,
        max_tokens=steps * batch * length,
        max_norm=settings["clip_norm"],
    )
    with tempfile.TemporaryDirectory() as name:
        litgpt.pretrain.fit(
            fabric=fabric,
            devices=1,
            state={**state, "iter_num": 0, "step_count": 0},
            train_dataloader=fabric.setup_dataloaders(data),
            val_dataloader=[torch.from_numpy(np.array(rows[0, :1]))],  # it insists on a look before the first step
            out_dir=Path(name),
            tokenizer_dir=None,
            train=train,
            eval=EvalArgs(interval=10**9, initial_validation=False, final_validation=False),
        )


class Rows(torch.utils.data.Dataset):
    """The benchmark's rows [T + 1] one by one."""

    def __init__(self, rows: np.ndarray, steps: int) -> None:
        self.rows, self.steps, self.batch = rows, steps, rows.shape[1]

    def __len__(self) -> int:
        return self.steps * self.batch

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.array(self.rows[index // self.batch, index % self.batch]))


if __name__ == "__main__":
    measure(run, sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
