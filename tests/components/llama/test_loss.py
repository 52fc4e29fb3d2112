"""The chunked loss equals the full one, and never holds the logits."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modelmill.components.training.loss import _LinearCrossEntropy, default_chunk_tokens, linear_cross_entropy


def problem(rows, width, vocab, ignored=0.2, dtype=torch.float32):
    hidden = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    weight = (0.3 * torch.randn(vocab, width, dtype=dtype)).requires_grad_()
    targets = torch.randint(0, vocab, (rows,))
    targets[torch.rand(rows) < ignored] = -100
    return hidden, weight, targets


def gradients(loss, hidden, weight, scale=1.0):
    return torch.autograd.grad(loss * scale, (hidden, weight))


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any tensor made inside it has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignored", [0.0, 0.2, 0.9])
@pytest.mark.parametrize(
    ("rows", "width", "vocab", "chunk"),
    [(37, 16, 101, 8), (64, 24, 50, 64), (1, 8, 3, 1), (130, 8, 257, None), (7, 5, 11, 100)],
)
def test_loss_and_gradients_equal_full_logits(rows, width, vocab, chunk, ignored, reduction):
    hidden, weight, targets = problem(rows, width, vocab, ignored)
    targets[0] = 1
    full = F.cross_entropy(F.linear(hidden, weight), targets, reduction=reduction)
    ours = linear_cross_entropy(hidden, weight, targets, chunk_tokens=chunk, reduction=reduction)
    torch.testing.assert_close(ours, full, rtol=1e-6, atol=1e-6)
    scale = 0.25 if reduction == "mean" else 1 / rows
    expected, found = gradients(full, hidden, weight, scale), gradients(ours, hidden, weight, scale)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_masking_used_on_accelerators_equals_leaving_rows_out():
    hidden, weight, targets = problem(40, 16, 77)
    targets[8:16] = -100  # one whole chunk
    full = F.cross_entropy(F.linear(hidden, weight), targets)
    ours = _LinearCrossEntropy.apply(hidden, weight, targets, targets != -100, 8, True, torch.float32, [True, True])
    torch.testing.assert_close(ours, full, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients(ours, hidden, weight), gradients(full, hidden, weight), rtol=1e-5, atol=1e-6)


def test_float64_stays_float64():
    hidden, weight, targets = problem(9, 4, 13, dtype=torch.float64)
    targets[0] = 1
    full = F.cross_entropy(F.linear(hidden, weight), targets)
    ours = linear_cross_entropy(hidden, weight, targets, chunk_tokens=4)
    torch.testing.assert_close(ours, full, rtol=1e-14, atol=1e-14)
    expected, found = gradients(full, hidden, weight), gradients(ours, hidden, weight)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_ignore_index_can_be_a_token():
    hidden, weight, targets = problem(20, 8, 11, ignored=0.0)
    targets[:5] = 3
    expected = F.cross_entropy(F.linear(hidden, weight), targets, ignore_index=3)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets, ignore_index=3), expected)


def test_without_targets_the_mean_is_nan_as_in_torch_and_gradients_are_zero():
    hidden, weight, _ = problem(6, 4, 5)
    targets = torch.full((6,), -100)
    assert linear_cross_entropy(hidden, weight, targets, reduction="sum").item() == 0.0
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.isnan()
    assert all((gradient == 0).all() for gradient in gradients(loss, hidden, weight))


def test_extreme_logits_stay_finite():
    hidden, weight, targets = problem(12, 8, 30, ignored=0.0)
    scaled = (hidden.detach() * 1e4).requires_grad_()
    loss = linear_cross_entropy(scaled, weight, targets)
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(scaled, weight), targets))
    assert all(gradient.isfinite().all() for gradient in gradients(loss, scaled, weight))


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_as_good_as_its_inputs(autocast):
    hidden, weight, targets = problem(200, 32, 301)
    exact = F.cross_entropy(F.linear(hidden, weight), targets)
    expected = gradients(exact, hidden, weight)
    if autocast:
        low = (hidden, weight)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=32)
    else:
        low = tuple(tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight))
        loss = linear_cross_entropy(*low, targets, chunk_tokens=32)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=5e-3, atol=5e-3)
    for found, wanted, source in zip(gradients(loss, *low), expected, low, strict=True):
        assert found.dtype == source.dtype
        assert (found.float() - wanted).norm() < 0.02 * wanted.norm()


def test_no_tensor_as_large_as_the_logits_is_ever_made():
    hidden, weight, targets = problem(512, 8, 1024)
    with LargestTensor() as full:
        F.cross_entropy(F.linear(hidden, weight), targets).backward()
    with LargestTensor() as chunked:
        linear_cross_entropy(hidden, weight, targets, chunk_tokens=64).backward()
    assert full.elements == 512 * 1024
    assert chunked.elements == 64 * 1024


def test_no_gradient_is_computed_when_none_is_wanted():
    hidden, weight, targets = problem(32, 8, 64)
    products = []

    class CountProducts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
                products.append(func)
            return func(*args, **(kwargs or {}))

    with CountProducts(), torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=32)
    assert len(products) == 1
    assert not loss.requires_grad
    frozen = linear_cross_entropy(hidden, weight.detach(), targets, chunk_tokens=16)
    full = F.cross_entropy(F.linear(hidden, weight), targets)
    torch.testing.assert_close(torch.autograd.grad(frozen, hidden), torch.autograd.grad(full, hidden))


def test_a_second_backward_is_refused():
    hidden, weight, targets = problem(8, 4, 9)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_wrong_arguments_are_named():
    hidden, weight, targets = problem(8, 4, 9)
    with pytest.raises(ValueError, match="weight"):
        linear_cross_entropy(hidden, weight[:, :3], targets)
    with pytest.raises(ValueError, match=r"targets must be \[8\]"):
        linear_cross_entropy(hidden, weight, targets[:5])
    with pytest.raises(ValueError, match="chunk_tokens"):
        linear_cross_entropy(hidden, weight, targets, chunk_tokens=0)
    with pytest.raises(ValueError, match="reduction"):
        linear_cross_entropy(hidden, weight, targets, reduction="none")


@pytest.mark.parametrize(
    ("vocab", "device", "rows"), [(4096, "cpu", 512), (128256, "cpu", 128), (128256, "cuda", 512)]
)
def test_chunks_follow_the_vocabulary(vocab, device, rows):
    assert default_chunk_tokens(vocab, device) == rows
