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

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreting process cannot compile (make gates)", allow_module_level=True)
triton = pytest.importorskip("triton")

from retro_kernels import triton_attention, triton_cross_entropy, triton_gather_neighbors, triton_rope
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a block may have
# head width, group, m, rotated pairs, type, causal: what presets and the design's tables use, and the widest.
ATTENTIONS = [
    (64, 1, 64, 32, "bf16", False),
    (64, 4, 64, 32, "bf16", False),
    (32, 1, 32, 16, "bf16", False),
    (128, 1, 64, 64, "bf16", False),
    (128, 1, 64, 32, "fp16", False),
    (96, 1, 32, 24, "fp16", False),
    (256, 1, 64, 128, "bf16", False),
    (32, 1, 32, 16, "fp32", False),
    (64, 1, 64, 32, "fp32", False),
    (128, 1, 64, 64, "fp32", False),
    (64, 1, 64, 0, "bf16", True),
    (64, 1, 64, 0, "fp32", True),
]
MAX_STACK = 512  # bytes, where there may be any: backward with heads above 128, and fp32, which no tensor core runs
REGISTERS = 65_536  # of a multiprocessor


def compiled(function, constants, types, capability: int, options, path: Path):  # type: ignore[no-untyped-def]
    """(PTX, registers, stack bytes, shared bytes) of one kernel."""
    signature = {name: "constexpr" if name in constants else types(name) for name in function.arg_names}
    is_aligned = lambda name: signature[name][0] == "*" or re.fullmatch(r"[qkvog]o?_[bnhljs]", name)  # noqa: E731
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if is_aligned(name)}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    path.write_bytes(kernel.asm["cubin"])
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    usage = subprocess.run([tools / "cuobjdump", "--dump-resource-usage", path], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return kernel.asm["ptx"], int(found[1]), int(found[2]), kernel.metadata.shared


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("case", "drops"), [*((case, False) for case in ATTENTIONS), (ATTENTIONS[0], True)], ids=str)
def test_attention(tmp_path: Path, case: tuple, drops: bool, direction: str, capability: int) -> None:  # type: ignore[type-arg]
    width, group, m, pairs, dtype, is_causal = case
    is_backward = direction == "backward"
    which = capability, width, m * group, dtype == "fp32", is_causal, drops
    tile = triton_attention.tile_of(*which, is_backward)
    constants = triton_attention.constants(
        width, pairs, 1 if is_causal else 2, group, is_causal, (False, not is_causal, is_causal), False, drops
    )
    constants |= {name: tile[name] for name in ("BM", "BN")}

    def types(name: str) -> str:
        if name in ("Q", "K", "V", "O", "DO", "DQ", "DK", "DV"):
            return f"*{dtype}"
        if name in ("LSE", "COS", "SIN", "BEGINS", "ENDS", "FIRST", "SEED"):
            return "*i64" if name in ("BEGINS", "ENDS", "FIRST", "SEED") else "*fp32"
        return "fp32" if name.startswith("scale") else "i32"

    function = triton_attention._attention_forward
    if is_backward:
        is_whole = triton_attention.is_whole(*which)
        function = triton_attention._attention_backward_whole if is_whole else triton_attention._attention_backward
    options = {name: tile[name] for name in ("num_warps", "num_stages")}
    ptx, registers, stack, shared = compiled(function, constants, types, capability, options, tmp_path / "kernel")
    assert registers <= 255
    is_bound = dtype != "fp32" and width <= 128
    limit = 0 if is_bound or not (dtype == "fp32" or is_backward) else MAX_STACK
    assert stack <= limit, f"{stack} bytes of stack"
    assert shared <= SHARED_MEMORY[capability] * 1024
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * tile["num_warps"])
    by_memory = (SHARED_MEMORY[capability] + 1) * 1024 // (shared + 1024)
    if is_bound:
        assert min(by_registers, by_memory) >= 2 or tile["num_stages"] >= 2
    if capability == 90 and dtype != "fp32" and tile["BM"] >= 64:
        assert "wgmma" in ptx


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_rope_cross_entropy_and_gather(tmp_path: Path, dtype: str, capability: int) -> None:
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
        _, _, stack, _ = compiled(
            triton_rope._rope, constants, types, capability, {"num_warps": 4}, tmp_path / "kernel"
        )
        assert stack == 0
    constants = {"HAS_GRADIENT": True, "BLOCK": (tile := triton_cross_entropy.tile(50_257))["BLOCK"]}
    function, options = triton_cross_entropy._cross_entropy, {"num_warps": tile["num_warps"]}
    _, _, stack, _ = compiled(function, constants, types, capability, options, tmp_path / "kernel")
    assert stack == 0
    constants = triton_gather_neighbors.constants(64, 128) | {"UNSIGNED": False}
    function = triton_gather_neighbors._gather_neighbors
    _, _, stack, _ = compiled(function, constants, types, capability, {"num_warps": 1}, tmp_path / "kernel")
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
