"""Gate: every shipped configuration compiles for sm_80, 86, 89, 90, 100 and 120 without a GPU, within the limits of each.

Registers and stack come from the cuobjdump in Triton's own package. Stack stands for spills: none in half precision up to heads of
128, where also two programs fit a multiprocessor or loads run two stages ahead; a bound elsewhere. The CUDA files go
through nvcc where it is installed.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreting process cannot compile (make gates)", allow_module_level=True)
triton = pytest.importorskip("triton")

from retro_kernels import triton_cross_entropy, triton_gather_neighbors, triton_rope

from retro_engine.bench.checkout import load

gpu_code = load("gpu_code")
compiled, ATTENTIONS, SHARED_MEMORY = gpu_code.compiled, gpu_code.ATTENTIONS, gpu_code.SHARED_MEMORY
ROOT = Path(__file__).parents[2]
MAX_STACK = 512  # bytes, where there may be any: backward with heads above 128, and fp32, which no tensor core runs
# What is short of the goals, known and stated in docs/kernels.md: without wgmma, of more rows than one program holds, and with
# dropout on 10.0 each side is read again.
KNOWN = {"bytes"}


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("one", ATTENTIONS, ids=str)
def test_attention(one: Any, direction: str, capability: int) -> None:
    code = gpu_code.attention_code(one, direction, capability)
    assert code.registers <= 255 and code.shared <= SHARED_MEMORY[capability] * 1024
    assert code.stack <= (0 if one.dtype != "fp32" and direction == "forward" else MAX_STACK)
    is_read_again = direction == "backward" and (
        not 90 <= capability < 120 or one.m * one.group > 128 or (one.drops and capability >= 100 and one.width <= 64)
    )
    assert set(code.misses(one, direction, capability)) <= (KNOWN if is_read_again else set())


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_rope_cross_entropy_and_gather(dtype: str, capability: int) -> None:
    def types(name: str) -> str:
        if name in ("Q", "K", "Q_OUT", "K_OUT"):
            return f"*{dtype}"
        if name in ("COS", "SIN", "POSITIONS"):
            return "*i64" if name == "POSITIONS" else "*fp32"
        if name in ("X", "LOSSES"):
            return f"*{dtype}" if name == "X" else "*fp32"
        if name in ("DOCUMENT", "IDS", "LENGTHS", "LABELS"):
            return "*i64"
        if name in ("TABLE", "TOKENS", "ROW_LENGTHS"):
            return "*i32"
        return "fp32" if name == "sign" else "i32"

    for width, rotated, is_interleaved in ((64, 32, False), (128, 32, True), (96, 48, False)):
        constants = triton_rope.constants(width, rotated, is_interleaved, True) | {"TOKENS": 16}
        _, _, stack, _ = compiled(triton_rope._rope, constants, types, capability, {"num_warps": 4})
        assert stack == 0
    constants = {"HAS_GRADIENT": True, "BLOCK": (tile := triton_cross_entropy.tile(50_257))["BLOCK"]}
    function, options = triton_cross_entropy._cross_entropy, {"num_warps": tile["num_warps"]}
    _, _, stack, _ = compiled(function, constants, types, capability, options)
    assert stack == 0
    constants = triton_gather_neighbors.constants(64, 128) | {"UNSIGNED": False}
    function = triton_gather_neighbors._gather_neighbors
    _, _, stack, _ = compiled(function, constants, types, capability, {"num_warps": 1})
    assert stack == 0


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
@pytest.mark.parametrize("architecture", ["80", "90a", "100a"])
def test_cuda_files(tmp_path: Path, architecture: str) -> None:
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
        command = ["nvcc", "-std=c++17", "-O3", "-c", "-Xptxas", "-v", target, source, "-o", tmp_path / "kernel.o"]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        spills = re.findall(r"(\d+) bytes spill stores", run.stderr)
        assert spills and not any(map(int, spills)), run.stderr
