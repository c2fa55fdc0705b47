"""Gate: the CUDA C++ kernels compiled for the processor and run there, thread after thread, against float64.

No kernel of csrc/cuda waits for another thread, so that a loop over the grid computes what a GPU would: g++ is given headers
that stand for CUDA's (bfloat16 rounds to nearest even), and launches become calls. Half precision is left out: GCC 12 has no such type.
"""

import contextlib
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from kernel_helpers import TOLERANCE, relative_error, rotary_tables
from retro_kernels import reference

ROOT = Path(__file__).parents[2]
RUNTIME = """
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
struct dim3 { unsigned x, y, z; dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {} };
inline dim3 gridDim(1), blockDim(1), blockIdx(0, 0, 0), threadIdx(0, 0, 0);
using std::min, std::max;
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum { cudaHostRegisterMapped, cudaHostRegisterReadOnly };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaHostGetDevicePointer(void** to, void* from, unsigned) { *to = from; return cudaSuccess; }
inline cudaError_t cudaHostRegister(void*, size_t, unsigned) { return cudaSuccess; }
inline cudaError_t cudaHostUnregister(void*) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int*) { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return ""; }
template <class F> void each_thread(dim3 grid, unsigned threads, F kernel) {
  gridDim = grid, blockDim = dim3(threads);
  for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++)
    for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
      for (blockIdx.z = 0; blockIdx.z < grid.z; blockIdx.z++)
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++) kernel();
}
struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) { uint32_t b; std::memcpy(&b, &x, 4); bits = uint16_t((b + 0x7fff + (b >> 16 & 1)) >> 16); }
  operator float() const { const uint32_t b = uint32_t(bits) << 16; float x; std::memcpy(&x, &b, 4); return x; }
};
using __half = __nv_bfloat16;
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """kernels/cuda.py on the library for the processor."""
    if not shutil.which("g++"):
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "cuda_runtime.h").write_text(RUNTIME)
    for name in ("cuda_bf16.h", "cuda_fp16.h"):
        (folder / name).write_text('#include "cuda_runtime.h"\n')
    source = (ROOT / "csrc/cuda/kernels.cu").read_text()
    launch = re.compile(r"(\w+<[^<>;]+>)<<<(.+?), (\d+), 0, stream>>>\((.*)\);")
    source, count = launch.subn(r"each_thread(\2, \3, [&] { \1(\4); });", source)
    assert count == source.count("each_thread(") > 1 and "<<<" not in source
    (folder / "kernels.cpp").write_text(source)
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-w", f"-I{folder}"]
    run = subprocess.run([*command, folder / "kernels.cpp", "-o", folder / "_cuda.so"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    spec = importlib.util.spec_from_file_location("cuda_on_cpu", ROOT / "kernels/cuda.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.LIBRARY = folder / "_cuda.so"  # type: ignore[attr-defined]
    return module


@pytest.fixture(autouse=True)
def _no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))


# head width, rotated: both ways of access (16 bytes, single values), with what passes through and without
@pytest.mark.parametrize(("width", "rotated"), [(64, 64), (128, 64), (80, 40), (18, 12), (96, 64)])
@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rope(kernels: ModuleType, dtype: torch.dtype, is_interleaved: bool, width: int, rotated: int) -> None:
    cos, sin = rotary_tables(100, rotated)
    wide = torch.randn(2, 67, 11, 2 * width).to(dtype)
    q, k = wide[:, :, :9, :width], wide[:, :, 9:, width:]
    for positions in (None, torch.randint(-2, 102, (67,)), torch.randint(0, 100, (2, 67))):
        for inverse in (False, True):
            found = kernels.rope_qk(q, k, cos, sin, positions, is_interleaved, inverse)
            inside = None if positions is None else positions.clamp(0, 99)
            for a, x in zip(found, (q, k)):
                exact = reference.rope(x.double(), cos, -sin if inverse else sin, inside, is_interleaved)
                assert relative_error(a, exact) < TOLERANCE[dtype]
    none = torch.empty(2, 67, 0, width, dtype=dtype)
    alone, empty = kernels.rope_qk(q, none, cos, sin, None, is_interleaved, False)
    assert (
        torch.equal(alone, kernels.rope_qk(q, k, cos, sin, None, is_interleaved, False)[0])
        and empty.shape == none.shape
    )


def test_gathering(kernels: ModuleType) -> None:
    table, document = torch.randint(0, 30_000, (100, 12)).int(), torch.arange(100) // 7
    lengths = torch.where(torch.arange(100) % 7 == 6, 5, 12)
    ids = torch.randint(-1, 103, (16, 2))
    for retrieved in (5, 24, 40):
        found = kernels.gather_neighbors(table, document, lengths, ids, retrieved, 7)
        ids_inside = torch.where(ids < 100, ids, -1)
        expected = reference.gather_neighbors(table, document, lengths, ids_inside, retrieved, 7)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
