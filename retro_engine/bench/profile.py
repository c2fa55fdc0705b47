"""`bench profile`: where a training step and a step of decoding spend their time, as text files to keep and compare.

A step by operator (torch's profiler; our kernels are operators of their own), decoding by function (cProfile: there the
time is in our C++ calls and in Python between them).
"""

import cProfile
import io
import pstats

import torch

from retro_engine.bench.contestants import SHAPES, Inputs, M, build
from retro_engine.bench.frame import CPU, Measured, Options
from retro_engine.bench.machine import environment
from retro_engine.train.precision import has_fast_bf16

ROWS = 24
PROMPT, NEW = 256, M


def run(options: Options) -> Measured:
    """Write OUT/profiles/step-SIZE-TYPE.txt and decode-SIZE-TYPE.txt; there are no rows."""
    folder = options.out / "profiles"
    folder.mkdir(parents=True, exist_ok=True)
    head = ", ".join(f"{key} {value}" for key, value in environment(CPU).items()) + "\n\n"
    for size in options.sizes:
        names = ["ours", *(["ours, bf16"] if has_fast_bf16() else [])]
        texts = {f"step-{size}-{_type(name)}.txt": _step(size, name) for name in names}
        for name in ("ours", "ours, bf16 weights", "ours, int8 weights"):
            texts[f"decode-{size}-{_type(name)}.txt"] = _decode(size, name)
        for name, text in texts.items():
            (folder / name).write_text(head + text)
            print(folder / name)
    return Measured([])


def _type(name: str) -> str:
    return name.partition(", ")[2].split(" ")[0] or "fp32"


def _step(size: str, name: str) -> str:
    _, step, _ = build(name, SHAPES[size])
    inputs = Inputs.draw(SHAPES[size])
    for _ in range(3):
        step(inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(inputs)
    events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    lines = [f"one step of {SHAPES[size].batch} x {SHAPES[size].length} tokens: {total / 1e6:.3f} s\n"]
    lines += [f"{'operator':<52}{'share':>8}{'ms':>10}{'calls':>8}"]
    for event in events[:ROWS]:
        own = event.self_cpu_time_total
        lines.append(f"{event.key[:50]:<52}{own / total:>8.1%}{own / 1e3:>10.2f}{event.count:>8}")
    return "\n".join(lines) + "\n"


def _decode(size: str, name: str) -> str:
    module, _, decode = build(name, SHAPES[size])
    inputs = Inputs.draw(SHAPES[size])
    prompts, neighbors = inputs.tokens[:1, :PROMPT], inputs.neighbors[:1]
    module.eval()
    with torch.inference_mode():
        decode(prompts, neighbors, NEW)
        profile = cProfile.Profile()
        profile.runcall(decode, prompts, neighbors, NEW)
    text = io.StringIO()
    stats = pstats.Stats(profile, stream=text)
    stats.strip_dirs().sort_stats("tottime").print_stats(ROWS)
    table = [line for line in text.getvalue().splitlines() if line.strip()]
    return f"a prompt of {PROMPT} tokens and {NEW} new ones, batch 1\n\n" + "\n".join(table) + "\n"
