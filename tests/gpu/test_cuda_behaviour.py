"""Streams, graphs, contexts, processes and errors."""

from __future__ import annotations

import ctypes
import json
import os
import threading

import pytest
import torch

import ferrotune
from ferrotune.ops import cuda, dropout
from ferrotune.ops.types import Quant4bit


def quantised(seed: int = 0, nested: bool = True) -> Quant4bit:
    generator = torch.Generator("cuda").manual_seed(seed)
    values = torch.randn(256, 512, device="cuda", generator=generator)
    return cuda.quantize_4bit(values.bfloat16(), 64, "nf4", nested)


def test_work_goes_to_the_current_stream() -> None:
    quant = quantised()
    want = cuda.dequantize_4bit(quant, torch.bfloat16)
    late = quant._replace(packed=torch.zeros_like(quant.packed))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # on the default stream the codes would still be zeros
        late.packed.copy_(quant.packed)
        found = [
            cuda.dequantize_4bit(late, torch.bfloat16, transpose) for transpose in (False, True)
        ]
        assert not stream.query()  # nothing waited
    stream.synchronize()
    assert torch.equal(found[0], want)
    assert torch.equal(found[1], want.t())


def test_graphs_capture_and_replay() -> None:
    values = torch.randn(256, 512, device="cuda").bfloat16()
    seed = torch.tensor([5], device="cuda")

    def work() -> tuple[torch.Tensor, ...]:
        quant = cuda.quantize_4bit(values, 64, "nf4", True)
        straight = cuda.dequantize_4bit(quant, torch.bfloat16)
        turned = cuda.dequantize_4bit(quant, torch.bfloat16, transpose=True)
        mask = cuda.dropout_mask(256, 512, 0.1, seed, 0, torch.float32)
        return straight, turned, mask

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    for step in range(3):
        values.copy_(torch.randn(256, 512, device="cuda") * (step + 1))
        seed.fill_(step)
        graph.replay()
        want = work()
        assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dropout_mask_is_the_cpu_one(dtype: torch.dtype) -> None:
    for rows, columns in [(1, 1), (3, 5), (7, 8), (33, 1001), (0, 5)]:
        for p in (0.0, 0.05, 0.5, 1.0):
            seed = torch.tensor([-(2**62) + 12345], device="cuda")
            got = cuda.dropout_mask(rows, columns, p, seed, 3, dtype)
            if p in (0.0, 1.0):
                want = torch.full_like(got, 1 - p, device="cpu")
            else:
                want = dropout.mask(rows * columns, p, seed.cpu(), 3).view(rows, columns).to(dtype)
            assert torch.equal(got.cpu(), want)


def test_masks_of_one_seed_differ_by_stream() -> None:
    seed = torch.tensor([1], device="cuda")
    first, second = (
        cuda.dropout_mask(64, 64, 0.5, seed, stream, torch.float32) for stream in (0, 1)
    )
    assert not torch.equal(first, second)


def test_public_operations_use_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from ferrotune import _native, ops

    calls = []
    for name in ("cuda_quantize_4bit", "cuda_dequantize_4bit"):
        original = getattr(_native, name)

        def spy(*args: object, name: str = name, original: object = original) -> None:
            calls.append(name)
            original(*args)  # type: ignore[operator]

        monkeypatch.setattr(_native, name, spy)
    values = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)
    quant = ops.quantize_4bit(values)
    out = ops.dequantize_4bit(quant)
    assert calls == ["cuda_quantize_4bit", "cuda_dequantize_4bit"]
    assert (out - values).abs().max() < 0.5


def current_context() -> int | None:
    driver = ctypes.CDLL("libcuda.so.1")
    context = ctypes.c_void_p()
    assert driver.cuCtxGetCurrent(ctypes.byref(context)) == 0
    return context.value


def test_a_thread_keeps_its_context() -> None:
    """A new thread, whose device is 0, has that one's context afterwards; this thread's stays."""
    from ferrotune import _native

    seed = torch.tensor([5], device="cuda")
    out = torch.full((8,), -1.0, device="cuda")
    cuda.prepare()
    torch.cuda.synchronize()
    before = current_context()
    seen: list[object] = []

    def work() -> None:
        seen.append(current_context())
        arguments = (out.data_ptr(), "float32", 8, 0.5, seed.data_ptr(), 0)
        _native.cuda_dropout_mask(seed.device.index, 0, *arguments)
        seen.append(current_context())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert seen == [None, before]
    assert current_context() == before
    assert set(out.tolist()) <= {0.0, 2.0}


def test_every_device() -> None:
    for index in range(torch.cuda.device_count()):
        values = torch.randn(64, 64, device=f"cuda:{index}", dtype=torch.bfloat16)
        quant = cuda.quantize_4bit(values, 64, "nf4", True)
        assert cuda.dequantize_4bit(quant, torch.bfloat16).device.index == index
        assert torch.cuda.current_device() == 0


def test_errors_carry_cudas_names() -> None:
    from ferrotune import _native

    with pytest.raises(ferrotune.CudaError, match="CUDA_ERROR_INVALID_DEVICE") as caught:
        cuda.prepare(torch.cuda.device_count())
    assert caught.value.code == 101
    with pytest.raises(ferrotune.CudaError, match="was not prepared") as caught:
        _native.cuda_dropout_mask(60, 0, 0, "float32", 8, 0.5, 0, 0)
    assert caught.value.code == 3


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_is_told() -> None:
    cuda.prepare(0)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            cuda.prepare(0)
            said: object = "no error"
        except ferrotune.CudaError as error:
            said = [error.code, str(error)]
        os.write(writer, json.dumps(said).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = json.loads(pipe.read())
    os.waitpid(child, 0)
    assert said[0] == 3
    assert "spawn" in said[1]


def test_doctor_names_the_device() -> None:
    found = ferrotune.doctor()
    assert [device.native for device in found.devices] == [True] * torch.cuda.device_count()
    assert torch.cuda.get_device_name(0) in str(found)
    assert "4-bit dequantisation" in str(found)
