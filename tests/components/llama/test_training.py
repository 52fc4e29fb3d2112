"""Training follows the same path as transformers from the same weights on the same batches."""

import pytest
import torch

from modelmill.components.llama.huggingface import load_huggingface

from .test_huggingface import upstream_model


def train(model, loss_of, batches, learning_rate):
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)
    losses = []
    for batch in batches:
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("learning_rate", [3e-4, 1e-3])
def test_fifty_adamw_steps_give_the_same_losses(config, learning_rate, tmp_path):
    upstream = upstream_model(config).train()
    upstream.save_pretrained(tmp_path)
    ours = load_huggingface(tmp_path)
    # A learnable rule: each token follows from the one before, with some noise.
    tokens = torch.randint(0, 211, (50, 4, 33))
    for position in range(1, 33):
        follow = torch.rand(50, 4) < 0.8
        tokens[:, :, position] = torch.where(
            follow, (tokens[:, :, position - 1] * 3 + 1) % 211, tokens[:, :, position]
        )
    expected = train(upstream, lambda b: upstream(input_ids=b, labels=b).loss, tokens, learning_rate)
    found = train(ours, lambda b: ours(b[:, :-1], b[:, 1:]), tokens, learning_rate)
    assert expected[-1] < expected[0] - 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
