"""The models that `bench model` and `bench decode` compare, each in a process of its own.

A `Contestant` works only when it is told to, so that they can take turns, and has a peak of memory of its own. Ours are
built here, the rivals (megatron-core's and retro-pytorch's RETRO, GPT-2) in a checkout's benchmarks/peers.py; one that is
absent is left out by name. Letters as in model/flops.py.
"""

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

from retro_engine.bench import checkout
from retro_engine.bench.machine import forget_peak, free_memory, resident_mib
from retro_engine.config import ModelConfig, OptimConfig, preset_model
from retro_engine.errors import OutOfResourceError, UsageError
from retro_engine.model import flops
from retro_engine.model.decode_cache import new_cache
from retro_engine.model.decoding import step as decode_step
from retro_engine.model.quantize import use_weights
from retro_engine.model.retro import RetroModel
from retro_engine.train.optimizer import Optimizer

NAMES = (
    "ours",
    "ours, selective",
    "ours, full",
    "ours, compiled",
    "ours, bf16",
    "ours, bf16 compiled",
    "megatron-core",
    "retro-pytorch",
    "gpt2",
)
RETRO_PEERS = ("megatron-core", "retro-pytorch")
RECOMPUTED = "ours, recomputed"  # without its cache
DECODERS = ("ours", "ours, bf16 weights", "ours, int8 weights", RECOMPUTED, *RETRO_PEERS, "gpt2")
M, K = 64, 2


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The work: megatron-core's RETRO (chunked cross-attention in layers 6, 9, 12, ..., an encoder of 2 layers)."""

    layers: int
    width: int
    heads: int
    vocab: int
    length: int = 512
    batch: int = 2

    @property
    def cross_layers(self) -> list[int]:
        return list(range(5, self.layers, 3))

    def config(self) -> ModelConfig:
        return preset_model(
            "mcore", vocab_size=self.vocab, encoder_seq_length=self.length, chunk_size=M, num_neighbors=K, hidden_size=self.width,
            ffn_hidden_size=4 * self.width, num_attention_heads=self.heads, dec_num_layers=self.layers, enc_num_layers=2,
            dec_cross_attention=self.cross_layers, hidden_dropout=0.0, attention_dropout=0.0,
            partial_chunk="last",  # megatron-core's alignment cannot be decoded with a cache; the work is the same
        )  # fmt: skip

    def forward_flops(self, has_retrieval: bool = True) -> float:
        tokens = self.batch * self.length
        return flops.forward_flops(self.config(), tokens, tokens // M * K * 2 * M if has_retrieval else 0)


SHAPES = {
    "5M": Shape(layers=6, width=192, heads=3, vocab=4096),
    "30M": Shape(layers=9, width=384, heads=6, vocab=16384),
    "57M": Shape(layers=12, width=512, heads=8, vocab=16384),
    "120M": Shape(layers=12, width=768, heads=12, vocab=16384),
}


@dataclass
class Inputs:
    """Random tokens [B, N], labels [B, N] and neighbors [B, N / M, K, 2M] of one step, all of them valid."""

    tokens: Tensor
    labels: Tensor
    neighbors: Tensor

    @classmethod
    def draw(cls, shape: Shape, seed: int = 0) -> "Inputs":
        rng = torch.Generator().manual_seed(seed)
        size = (shape.batch, shape.length + 1)
        row = torch.randint(1, shape.vocab, size, generator=rng)
        places = (shape.batch, shape.length // M, K, 2 * M)
        return cls(row[:, :-1], row[:, 1:], torch.randint(1, shape.vocab, places, generator=rng))


Step = Callable[[Inputs], float]  # one optimizer step; returns the mean loss
Decode = Callable[[Tensor, Tensor, int], None]  # prompts [B, T], neighbors [B, l, K, 2M], new tokens


def missing(name: str) -> str:
    """Why a contestant cannot take part; empty = it can."""
    if name.startswith("ours"):
        return ""
    if not checkout.IS_HERE:
        return "rivals take a checkout of the repository, and make peers in it"
    return str(checkout.load("peers").missing(name))


def chosen(names: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """Those of `names` that a bench knows. Raises UsageError where names are given and it knows none."""
    found = [name for name in names or () if name in known]
    if names and not found:
        raise UsageError(f"--implementations {', '.join(names)}: this bench has none of them", "", ", ".join(known))
    return found


def present(names: Sequence[str]) -> list[str]:
    """Those that can take part; says why the others are left out."""
    for name in names:
        if missing(name):
            print(f"{name} is left out: {missing(name)}")
    return [name for name in names if not missing(name)]


def build(name: str, shape: Shape) -> tuple[nn.Module, Step, Decode]:
    torch.manual_seed(0)
    if name.startswith("ours"):
        return _ours(shape, name)
    built: tuple[nn.Module, Step, Decode] = checkout.load("peers").build(name, shape)
    return built


def _ours(shape: Shape, name: str) -> tuple[nn.Module, Step, Decode]:
    model = RetroModel(shape.config())
    kind = name.partition(", ")[2]
    model.set_recompute(kind if kind in ("selective", "full") else None)
    if kind.endswith("compiled"):
        model.compile()
    if kind.endswith(" weights"):  # to decode with
        use_weights(model, kind.removesuffix(" weights"))
    optimizer = Optimizer(model, OptimConfig(clip=None), {})
    autocast: Any = (
        torch.autocast("cpu", torch.bfloat16)
        if kind.startswith("bf16") and not kind.endswith(" weights")
        else contextlib.nullcontext()
    )

    def step(inputs: Inputs) -> float:
        optimizer.zero_grad()
        with autocast:
            loss = model(inputs.tokens, inputs.neighbors, labels=inputs.labels) / inputs.labels.numel()
        loss.backward()
        optimizer.step(1e-4, 0.0)
        return float(loss.detach())

    def decode(prompts: Tensor, neighbors: Tensor, new: int) -> None:
        start = prompts.shape[1]
        cache = new_cache(model, len(prompts), start + new)
        token = prompts
        given: Tensor | None = neighbors[:, : start // M]
        for t in range(start, start + new):
            logits = decode_step(model, cache, token, given, last_only=True)
            token = logits[:, -1].argmax(-1, keepdim=True)
            given = neighbors[:, t // M : t // M + 1] if (t + 1) % M == 0 else None

    return model, step, recompute(model) if name == RECOMPUTED else decode


def recompute(logits_of: Callable[[Tensor, Tensor], Tensor]) -> Decode:
    """Generation as the peers do it: the whole sequence again at every token. Prompts and steps are whole chunks or
    the last chunk is filled up, as megatron-core's own generation does.
    """

    def decode(prompts: Tensor, neighbors: Tensor, new: int) -> None:
        tokens = prompts
        for _ in range(new):
            padded = nn.functional.pad(tokens, (0, -tokens.shape[1] % M), value=1)
            logits = logits_of(padded, neighbors[:, : padded.shape[1] // M])
            tokens = torch.cat((tokens, logits[:, tokens.shape[1] - 1].argmax(-1, keepdim=True)), 1)

    return decode


def _work(connection: Connection, name: str, shape: Shape, threads: int) -> None:
    """The process of a contestant: answers (seconds, MiB, loss) to ("step", n) and seconds to ("decode", ...)."""
    torch.set_num_threads(threads)
    model, step, decode = build(name, shape)
    inputs = Inputs.draw(shape)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    before = resident_mib() + 12 * parameters / 2**20  # fp32: the weights are there, gradients and two moments are not
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    unread = ("encoder.", "neighbor_", *(("embedding.",) if getattr(model, "head", None) is not None else ()))
    connection.send((parameters, sum(w.nbytes for n, w in weights.items() if not n.startswith(unread))))
    while True:
        match connection.recv():
            case ("step", count):
                model.train()
                forget_peak()
                start = time.perf_counter()
                losses = [step(inputs) for _ in range(count)]
                seconds = (time.perf_counter() - start) / count
                connection.send((seconds, resident_mib(is_peak=True) - before, losses[-1]))
            case ("decode", prompts, neighbors, new):
                model.eval()
                with torch.inference_mode():
                    start = time.perf_counter()
                    decode(prompts, neighbors, new)
                    connection.send(time.perf_counter() - start)
            case _:
                return


def check_memory(names: Sequence[str], shape: Shape) -> None:
    """All contestants of a training step are in memory at once. Raises OutOfResourceError where they do not fit."""
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in RetroModel(shape.config()).parameters())
    tokens = shape.batch * shape.length
    each = 16 * parameters + 360 * tokens * shape.width * shape.layers  # the second as bench model has seen it
    free = free_memory()
    if free is not None and len(names) * each > free:
        raise OutOfResourceError(
            f"{len(names)} implementations do not fit into memory",
            f"about {each / 2**30:.1f} GiB each, {free / 2**30:.1f} GiB are free",
            '--implementations ours "ours, bf16" megatron-core, or a smaller one of --sizes',
        )


class Contestant:
    """One implementation in a process of its own. Leave it with `close`."""

    def __init__(self, name: str, shape: Shape, threads: int):
        self.name, self.shape = name, shape
        self._connection, other = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_work, args=(other, name, shape, threads), daemon=True)
        self._process.start()
        other.close()
        # weight_bytes: what a decoding step reads; the encoder and the neighbors' projection work once a chunk
        self.parameters, self.weight_bytes = self._ask(None)

    def _ask(self, what: Any) -> Any:
        if what is not None:
            self._connection.send(what)
        try:
            return self._connection.recv()
        except EOFError as error:
            raise RuntimeError(f"{self.name} failed; its traceback is above") from error

    def step(self, count: int = 1) -> tuple[float, float, float]:
        """Seconds of one of `count` training steps, peak MiB beyond weights, gradients and optimizer, the last loss."""
        seconds, mib, loss = self._ask(("step", count))
        return seconds, mib, loss

    def decode(self, prompts: Tensor, neighbors: Tensor, new: int) -> float:
        """Seconds of a prompt and `new` tokens after it."""
        return float(self._ask(("decode", prompts, neighbors, new)))

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._connection.send(None)
        self._process.join(10)
        self._process.kill()


@contextlib.contextmanager
def started(names: Sequence[str], shape: Shape) -> Iterator[list[Contestant]]:
    """One of each, on as many threads as this process has; all are ended with the block."""
    running: list[Contestant] = []
    try:
        for name in names:
            running.append(Contestant(name, shape, torch.get_num_threads()))
        yield running
    finally:
        for contestant in running:
            contestant.close()
