"""What Triton's compiler makes of every shipped configuration of the attentions, without a GPU:
`python benchmarks/gpu_code.py [CAPABILITY ...]` (80, 90; none = all) prints a table and what a row falls short of.

Of each: registers a thread, stack (stands for spills), shared memory, programs that fit a multiprocessor, stages, wgmma, and the bytes
that the programs ask for times the useful ones (kernels/traffic.py). tests/gates/test_compile.py holds it. One core takes
5 to 40 s a configuration that is not in Triton's cache; all cores are used.
"""

import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from retro_kernels import traffic, triton_attention
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a block may have, by capability
REGISTERS = 65_536  # of a multiprocessor
MOST_BYTES = {"forward": 1.15, "backward": 1.3}  # times the useful ones


@dataclass(frozen=True)
class Configuration:
    width: int  # of a head
    group: int  # query heads that share keys
    m: int  # chunk length: queries of a head; neighbors are two of 2 m
    pairs: int  # rotated
    dtype: str
    is_causal: bool = False
    drops: bool = False

    @property
    def is_bound(self) -> bool:
        """Whether the limits are for it: no tensor core runs fp32, and wider heads than 128 are rare."""
        return self.dtype != "fp32" and self.width <= 128


# What presets and the design's tables use, and the widest.
ATTENTIONS = [
    Configuration(64, 1, 64, 32, "bf16"),
    Configuration(64, 1, 64, 32, "bf16", drops=True),
    Configuration(64, 2, 64, 32, "bf16"),
    Configuration(64, 4, 64, 32, "bf16"),
    Configuration(32, 1, 32, 16, "bf16"),
    Configuration(128, 1, 64, 64, "bf16"),
    Configuration(128, 1, 64, 64, "bf16", drops=True),
    Configuration(128, 1, 64, 32, "fp16"),
    Configuration(96, 1, 32, 24, "fp16"),
    Configuration(256, 1, 64, 128, "bf16"),
    Configuration(32, 1, 32, 16, "fp32"),
    Configuration(64, 1, 64, 32, "fp32"),
    Configuration(128, 1, 64, 64, "fp32"),
    Configuration(64, 1, 64, 0, "bf16", is_causal=True),
    Configuration(64, 1, 64, 0, "fp32", is_causal=True),
]


@dataclass(frozen=True)
class Code:
    """One compiled kernel; `programs` of them fit a multiprocessor."""

    tile: str
    registers: int
    stack: int
    shared: int
    programs: int
    stages: int
    has_wgmma: bool
    bytes_factor: float | None  # None: causal attention over a sequence of any length

    def misses(self, one: Configuration, direction: str, capability: int) -> list[str]:
        """What is wanted of a configuration and not there."""
        rows = int(self.tile.split("x")[0])
        short = {
            "spills": self.stack > 0,
            "one program, one stage": self.programs < 2 and self.stages < 2,
            "no wgmma": capability == 90 and rows >= 64 and not self.has_wgmma,
            "bytes": self.bytes_factor is not None and self.bytes_factor > MOST_BYTES[direction],
        }
        return [what for what, is_so in short.items() if is_so and one.is_bound]


def compiled(  # type: ignore[no-untyped-def]
    function, constants: dict[str, Any], types: Callable[[str], str], capability: int, options: dict[str, int]
) -> tuple[str, int, int, int]:
    """(PTX, registers, stack bytes, shared bytes) of one kernel."""
    signature = {name: "constexpr" if name in constants else types(name) for name in function.arg_names}
    is_aligned = lambda name: signature[name][0] == "*" or re.fullmatch(r"[qkvog]o?_[bnhljs]", name)  # noqa: E731
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if is_aligned(name)}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [tools / "cuobjdump", "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return kernel.asm["ptx"], int(found[1]), int(found[2]), kernel.metadata.shared


def attention_code(one: Configuration, direction: str, capability: int) -> Code:
    is_backward, rows = direction == "backward", one.m * one.group
    which = capability, one.width, rows, one.dtype == "fp32", one.is_causal, one.drops
    tile, is_whole = triton_attention.tile_of(*which, is_backward), triton_attention.is_whole(*which)
    segments, flags = 1 if one.is_causal else 2, (False, not one.is_causal, one.is_causal)
    constants = triton_attention.constants(
        one.width, one.pairs, segments, one.group, one.is_causal, flags, False, one.drops
    )
    constants |= {name: tile[name] for name in ("BM", "BN")}

    def types(name: str) -> str:
        if name in ("Q", "K", "V", "O", "DO", "DQ", "DK", "DV"):
            return f"*{one.dtype}"
        if name in ("LSE", "COS", "SIN", "BEGINS", "ENDS", "FIRST", "SEED"):
            return "*i64" if name in ("BEGINS", "ENDS", "FIRST", "SEED") else "*fp32"
        return "fp32" if name.startswith("scale") else "i32"

    function = triton_attention._attention_forward
    if is_backward:
        function = triton_attention._attention_backward_whole if is_whole else triton_attention._attention_backward
    options = {name: tile[name] for name in ("num_warps", "num_stages")}
    ptx, registers, stack, shared = compiled(function, constants, types, capability, options)
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * tile["num_warps"])
    by_memory = (SHARED_MEMORY[capability] + 1) * 1024 // (shared + 1024)
    problem = traffic.Problems(1, rows, segments, 2 * one.m, one.width, one.pairs, 4 if one.dtype == "fp32" else 2)
    bytes_ = (
        traffic.backward(problem, tile["BM"], tile["BN"], is_whole)
        if is_backward
        else traffic.forward(problem, tile["BM"])
    )
    factor = None if one.is_causal else bytes_.factor
    name = "x".join(str(tile[part]) for part in ("BM", "BN", "num_warps")) + (
        " whole" if is_backward and is_whole else ""
    )
    found = (registers, stack, shared, min(by_registers, by_memory), tile["num_stages"], "wgmma" in ptx, factor)
    return Code(name, *found)


def _row(case: tuple[Configuration, str, int]) -> tuple[str, bool]:
    """A line of the table, and whether it falls short."""
    one, direction, capability = case
    code = attention_code(*case)
    kind = f"{one.dtype} e {one.width} x {one.m * one.group} rows"
    kind += " causal" * one.is_causal + " dropout" * one.drops
    factor = "-" if code.bytes_factor is None else f"{code.bytes_factor:.2f}"
    misses = code.misses(one, direction, capability)
    limits = ", ".join(misses) if one.is_bound else "no limits"
    numbers = f"{code.registers:4} {code.stack:6} {code.shared / 1024:6.0f} {code.programs:4} {code.stages:6} "
    line = f"{capability:4} {direction:8} {kind:32} {code.tile:16} {numbers}{'yes' if code.has_wgmma else '-':>5} {factor:>5}  {limits}"
    return line.rstrip(), bool(misses)


def main(arguments: Sequence[str]) -> int:
    if any(not one.isdigit() or int(one) not in SHARED_MEMORY for one in arguments):
        print(f"error: {' '.join(arguments)}: expected compute capabilities", file=sys.stderr)
        print(f"  these are known: {' '.join(map(str, SHARED_MEMORY))}", file=sys.stderr)
        print("  python benchmarks/gpu_code.py 90", file=sys.stderr)
        return 2
    cases = list(itertools.product(ATTENTIONS, MOST_BYTES, [int(one) for one in arguments] or SHARED_MEMORY))
    print(
        " cap direction configuration"
        + " " * 21
        + "tile x warps     regs  stack shared prog stages wgmma bytes  short of"
    )
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        short = 0
        for line, is_short in pool.map(_row, sorted(cases, key=lambda case: case[2])):
            print(line, flush=True)
            short += is_short
    print(f"{len(cases)} configurations, {short} short of something")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
