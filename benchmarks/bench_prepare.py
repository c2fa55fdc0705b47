"""Is preparing a corpus nearly as fast as its tokenizer alone? Same text, same threads, in turn, in one run."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from retro_engine.data.builtin import make_entities
from retro_engine.data.prepare import prepare
from retro_engine.data.tokenizer import Tokenizer

ROUNDS = 5
WIKIPEDIA = Path(__file__).resolve().parents[2] / "shared" / "data" / "wikipedia-featured-good.jsonl.zst"


def texts() -> list[str]:
    """About 20 MB: Wikipedia articles where they are at hand, generated facts elsewhere."""
    if not WIKIPEDIA.exists():
        return [" ".join(e.document for e in make_entities(40, seed)) for seed in range(1500)]
    import io

    import zstandard

    found: list[str] = []
    with open(WIKIPEDIA, "rb") as file:
        for line in io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8"):
            found.append(json.loads(line)["text"])
            if len(found) == 900:
                break
    return found


def test_prepare_against_tokenizers_alone(benchmark, tmp_path: Path) -> None:
    corpus = texts()
    size_mb = sum(len(text.encode()) for text in corpus) / 1e6
    source = tmp_path / "corpus.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus))
    tokenizer = Tokenizer.train(corpus[:200], 16384)
    (tmp_path / "tokenizer.json").write_text(tokenizer.json)
    alone, whole = [], []
    for number in range(ROUNDS):
        start = time.perf_counter()
        for first in range(0, len(corpus), 100):
            tokenizer.backend.encode_batch_fast(corpus[first : first + 100], add_special_tokens=False)
        alone.append(time.perf_counter() - start)
        start = time.perf_counter()
        prepare([source], tmp_path / f"store{number}", str(tmp_path / "tokenizer.json"))
        whole.append(time.perf_counter() - start)
    ratio = sorted(a / w for a, w in zip(alone, whole))[ROUNDS // 2]
    benchmark.extra_info |= {"MB": size_mb, "MB_per_s": size_mb / min(whole), "rate_against_tokenizers": ratio}
    benchmark.pedantic(lambda: prepare([source], tmp_path / "last", str(tmp_path / "tokenizer.json")), rounds=1)
    print(f"\nprepare {size_mb / min(whole):.1f} MB/s, {ratio:.2f} of tokenizers alone (target 0.8)")


@pytest.mark.parametrize("copies", [1, 4])
def test_memory_is_flat(benchmark, tmp_path: Path, copies: int) -> None:
    """Peak resident memory of `retro prepare` over 1x and 4x the text."""
    source = tmp_path / "corpus.jsonl"
    with open(source, "w") as file:
        for text in texts() * copies:
            file.write(json.dumps({"text": text}) + "\n")
    code = (
        "import sys; from retro_engine.cli import main\n"
        f"main(['prepare', {str(source)!r}, '--out', {str(tmp_path / 's')!r}, '--quiet'])\n"
        "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')], file=sys.stderr)"
    )
    done = benchmark.pedantic(
        lambda: subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True), rounds=1
    )
    peak_mib = int(done.stderr.split()[-1]) / 1024
    benchmark.extra_info["peak_MiB"] = peak_mib
    print(f"\n{copies}x: peak {peak_mib:.0f} MiB")
