"""Memory policies: which levels the blocks of a model get, and `ferrotune plan --memory`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import ferrotune
from ferrotune import cli
from ferrotune.options import SettingError
from ferrotune.planning.memory import (
    CHECKPOINTS,
    LEVELS,
    Setup,
    block_bytes,
    host_bytes,
    level_bytes,
    memory,
)
from ferrotune.planning.policy import MARGIN, choose, size_of
from ferrotune.planning.shapes import shape_of

GIB = 1 << 30

SIZES: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 8,
}  # fmt: skip


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_policy_that_recomputes_least(dropout: float, checkpointing: bool) -> None:
    shape = shape_of(SIZES, "here")
    setup = Setup(batch_size=4, lora_dropout=dropout)
    ladder = CHECKPOINTS if checkpointing else LEVELS
    order = {level: i for i, level in enumerate(LEVELS)}
    before, seen = None, set()
    for size in range(20 * GIB, GIB, -GIB // 3):
        found = choose(shape, setup, size, ladder)
        assert found.fits == (found.peak <= size)
        assert found.memory == memory(shape, setup, found.levels)
        assert len(found.levels) == 8
        steps = [order[level] for level in found.levels]
        plain = [step for step, level in zip(steps, found.levels, strict=True) if level != "spill"]
        assert plain == sorted(plain, reverse=True)  # the first layers recompute most
        if "spill" not in found.levels:
            assert max(steps) - min(steps) <= 1
        else:
            assert found.levels[-1] != "spill"
            assert set(found.levels) <= {"mlp", *LEVELS[LEVELS.index("spill") :]}
        if before is not None and found.fits:
            assert found.peak <= before.peak
            assert sum(steps) >= sum(order[level] for level in before.levels)
        before = found
        seen |= set(found.levels)
    assert seen == set(ladder)
    assert choose(shape, setup, 80 * GIB, ladder).levels == (ladder[0],) * 8
    smallest = choose(shape, setup, 1, ladder)
    assert not smallest.fits
    assert smallest.levels == ("offload",) * 7 + ("layer",)
    assert smallest.memory.host == 7 * 8192 * 4096 * 2


def test_uniform_levels_are_as_before() -> None:
    """Checkpointing is every layer at its level; what a level keeps falls from one to the next."""
    shape = shape_of(SIZES, "here")
    for dropout in (0.0, 0.1):
        setup = Setup(lora_dropout=dropout)
        kept = {level: level_bytes(shape, setup, level)[0] for level in LEVELS}
        spilled = kept.pop("spill")
        assert list(kept.values()) == sorted(kept.values(), reverse=True)
        assert kept["keep"] == block_bytes(shape, setup)
        assert [kept["layer"], kept["offload"]] == [2048 * 4096 * 2, 0]
        assert 0 < spilled < kept["layer"] / 10
        assert spilled + host_bytes(shape, setup, "spill") == kept["mlp"]
        asked = Setup(lora_dropout=dropout, checkpointing=True)
        assert memory(shape, asked) == memory(shape, setup, ["layer"] * 8)


@pytest.mark.parametrize(
    ("text", "size"),
    [("24 GiB", 24 << 30), ("20e9", 20e9), ("1.5GB", 15e8), ("512mib", 512 << 20), (3e9, 3e9),
     ("7 k", 7000), ("100", 100)],
)  # fmt: skip
def test_sizes(text: str | float, size: float) -> None:
    assert size_of(text) == size


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    return tmp_path


def test_plan_says_what_the_policy_would_do(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = ferrotune.plan(folder, batch_size=4, memory="6 GiB")
    assert found.policy is not None
    assert found.fits
    assert found.policy.available == 6 * GIB >= found.peak
    assert found.peak == found.policy.peak
    assert found.memory == found.policy.memory
    assert found.gpu_memory is None
    assert found.longest_sequence
    text = str(found)
    assert "memory policy" in text
    assert "policy for 6.00 GiB" in text
    assert all(f"{count} layer" in text for count in found.policy.counts.values())
    assert sum(found.policy.kept) == found.memory.activations - 2 * 8192 * 4096 * 2
    arguments = ["plan", str(folder), "--batch-size", "4", "--memory", "6 GiB", "--json"]
    assert cli.main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == found.to_dict()

    auto = ferrotune.plan(folder, batch_size=4, memory="auto", gpu_memory=8)
    assert auto.policy is not None
    assert auto.policy.available == int(7.25 * GIB)
    assert auto.fits
    plain = ferrotune.plan(folder, batch_size=4, gpu_memory=8)
    assert plain.longest_sequence is not None
    assert auto.longest_sequence is not None
    assert auto.longest_sequence > plain.longest_sequence
    asked = ferrotune.plan(folder, batch_size=4, checkpointing=True, memory="80 GiB")
    assert asked.policy is not None
    assert asked.policy.levels == ("layer",) * 8
    assert asked.peak == ferrotune.plan(folder, batch_size=4, checkpointing=True).peak
    hopeless = ferrotune.plan(folder, batch_size=64, memory="4 GiB")
    assert not hopeless.fits
    assert "on the host" in str(hopeless)
    assert hopeless.changes
    assert not [one for one in hopeless.changes if "checkpointing" in one.change]


def test_plan_leaves_the_room_that_a_patched_model_leaves(folder: Path) -> None:
    whole = ferrotune.plan(folder, batch_size=4).peak
    for part, kept in ((1 + MARGIN + 1e-6, True), (1 + MARGIN - 1e-3, False)):
        found = ferrotune.plan(folder, batch_size=4, memory=str(int(whole * part)))
        assert found.policy is not None
        assert found.fits
        assert (set(found.policy.levels) == {"keep"}) is kept


def test_bad_values(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for values, said in (
        ({"memory": "much"}, "memory must be 'auto' or a size"),
        ({"memory": "8 GiB", "method": "full"}, "for adapters"),
    ):
        with pytest.raises(SettingError, match=said):
            ferrotune.plan(folder, **values)  # type: ignore[arg-type]
    assert cli.main(["plan", str(folder), "--memory", "none"]) == 2
    assert "memory must be 'auto' or a size" in capsys.readouterr().err


def test_auto_without_a_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ferrotune.commands.plan._card", lambda: None)
    with pytest.raises(SettingError, match="give gpu_memory"):
        ferrotune.plan(folder, memory="auto")
