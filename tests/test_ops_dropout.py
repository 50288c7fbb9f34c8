"""Dropout masks: one definition in the Rust core and in PyTorch, and what it promises."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from ferrotune import ops  # noqa: E402
from ferrotune.ops import dropout  # noqa: E402


def by_torch(elements: int, p: float, seed: int, stream: int) -> torch.Tensor:
    """The definition in whole numbers, word by word; the core's vectors come from elsewhere."""
    return torch.tensor([one(i, p, seed, stream) for i in range(elements)])


def one(i: int, p: float, seed: int, stream: int) -> float:
    mask, lane = 2**32 - 1, i % 8
    counter = [i // 8 & mask, i // 8 >> 32, stream & mask, stream >> 32]
    key = [seed & mask, seed >> 32]
    for _ in range(7):
        low, high = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            high >> 32 ^ counter[1] ^ key[0], high & mask,
            low >> 32 ^ counter[3] ^ key[1], low & mask,
        ]  # fmt: skip
        key = [key[0] + 0x9E3779B9 & mask, key[1] + 0xBB67AE85 & mask]
    uniform = counter[lane // 2] >> 16 * (lane % 2) & 0xFFFF
    return float(1 / (1 - torch.tensor(p))) if uniform >= round(p * 65536) else 0.0


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_mask_is_the_definition(p: float) -> None:
    for seed, stream in [(0, 0), (2**62 + 12345, 3)]:
        mask = ops.dropout_mask((103,), p, torch.tensor([seed]), stream)
        assert torch.equal(mask, by_torch(103, p, seed, stream))


@pytest.mark.parametrize("p", [0.05, 0.3, 1.0])
def test_torch_and_the_core_agree(p: float) -> None:
    """The path of devices other than the CPU, run on the CPU."""
    seed = torch.tensor([2**61 + 999])
    found = dropout.mask_by_torch(100_003, p, seed, 5)
    assert torch.equal(found, ops.dropout_mask((100_003,), p, seed, 5))


def test_keep_rate_and_independence() -> None:
    seed, size = torch.tensor([9]), (1000, 1000)
    for p in (0.05, 0.1, 0.5):
        first, second = (ops.dropout_mask(size, p, seed, stream) for stream in (0, 1))
        rate = (first > 0).double().mean().item()
        assert abs(rate - (1 - p)) < 5 * (p * (1 - p) / 1e6) ** 0.5 + 2**-17
        both = ((first > 0) & (second > 0)).double().mean().item()
        assert abs(both - (1 - p) ** 2) < 5 * 0.5 / 1e3
        rows = (first > 0).double()
        neighbours = torch.corrcoef(torch.stack([rows[:, :-1].flatten(), rows[:, 1:].flatten()]))
        assert abs(neighbours[0, 1].item()) < 5e-3
    assert (ops.dropout_mask(size, 1.0, seed) == 0).all()


def test_seeds_come_from_torchs_generator() -> None:
    x = torch.randn(64, 32)
    weight, lora_A, lora_B = torch.randn(8, 32), torch.randn(4, 32), torch.randn(8, 4)

    def y() -> torch.Tensor:
        return ops.lora_linear(x, weight, lora_A, lora_B, dropout_p=0.5)

    torch.manual_seed(3)
    first, second = y(), y()
    torch.manual_seed(3)
    assert torch.equal(y(), first)
    assert torch.equal(y(), second)
    assert not torch.equal(first, second)


def test_16_bit_values_are_scaled_in_f32() -> None:
    x = torch.randn(64, 64).bfloat16()
    seed = torch.tensor([1])
    mask = ops.dropout_mask((64, 64), 0.05, seed)
    assert torch.equal(dropout.apply(x, 0.05, seed, 0), (x.float() * mask).bfloat16())
