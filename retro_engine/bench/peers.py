"""The models that `bench model` and `bench decode` compare: ours, megatron-core's and retro-pytorch's RETRO, GPT-2.

Every one lives in a process of its own (`Contestant`) and works only when it is told to, so that they can take turns
and each has a peak of memory of its own. The peers come from a folder that `make peers` fills with `pip install
--no-deps`; a peer that is absent is left out by name. Letters as in model/flops.py.
"""

import contextlib
import importlib.util
import multiprocessing
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retro_engine.bench.frame import forget_peak, free_memory, resident_mib
from retro_engine.config import ModelConfig, OptimConfig, preset_model
from retro_engine.errors import OutOfResourceError, UsageError
from retro_engine.model import flops
from retro_engine.model.decode_cache import new_cache
from retro_engine.model.decoding import step as decode_step
from retro_engine.model.quantize import use_weights
from retro_engine.model.retro import RetroModel
from retro_engine.train.optimizer import Optimizer

FOLDER = Path(os.environ.get("RETRO_PEERS", ".peers"))
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
DECODERS = ("ours", "ours, bf16 weights", "ours, int8 weights", *RETRO_PEERS, "gpt2")
M, K = 64, 2


@dataclass(frozen=True)
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
    "5M": Shape(6, 192, 3, 4096),
    "30M": Shape(9, 384, 6, 16384),
    "57M": Shape(12, 512, 8, 16384),
    "120M": Shape(12, 768, 12, 16384),
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
    if name == "gpt2":
        return "" if importlib.util.find_spec("transformers") else "transformers is not installed"
    package = {"megatron-core": "megatron", "retro-pytorch": "retro_pytorch"}[name]
    return "" if (FOLDER / package).is_dir() else f"{FOLDER}/{package} is not there: make peers"


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
    sys.path.insert(0, str(FOLDER.resolve()))
    return {"megatron-core": _megatron, "retro-pytorch": _retro_pytorch, "gpt2": _gpt2}[name](shape)


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

    return model, step, decode


def _with_adamw(model: nn.Module, loss_of: Callable[[Inputs], Tensor]) -> Step:
    """A step with torch's fastest AdamW."""
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(inputs: Inputs) -> float:
        adamw.zero_grad()
        loss = loss_of(inputs)
        loss.backward()
        adamw.step()
        return float(loss.detach())

    return step


def _recompute(logits_of: Callable[[Tensor, Tensor], Tensor]) -> Decode:
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


def _megatron(shape: Shape) -> tuple[nn.Module, Step, Decode]:
    """Its CUDA-only calls (random states, the current device) are replaced by what a processor has."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.FileStore(tempfile.mkdtemp() + "/store", 1), rank=0, world_size=1)
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    from megatron.core import parallel_state
    from megatron.core.models.retro import RetroConfig, get_retro_decoder_block_spec
    from megatron.core.models.retro import RetroModel as Megatron
    from megatron.core.models.retro import config as retro_config
    from megatron.core.transformer import dot_product_attention

    retro_config.is_te_min_version = lambda *_: False
    tracker = types.SimpleNamespace(fork=contextlib.nullcontext)
    dot_product_attention.tensor_parallel.get_cuda_rng_tracker = lambda *_: tracker
    parallel_state.initialize_model_parallel()
    config = RetroConfig(
        num_layers=shape.layers, hidden_size=shape.width, ffn_hidden_size=4 * shape.width, num_attention_heads=shape.heads,
        use_cpu_initialization=True, hidden_dropout=0.0, attention_dropout=0.0, retro_encoder_hidden_dropout=0.0,
        retro_encoder_attention_dropout=0.0, retro_chunk_length=M, retro_num_neighbors=K, retro_split_preprocessing="98,2,0",
        bias_activation_fusion=False,
    )  # fmt: skip
    spec = get_retro_decoder_block_spec(config, use_transformer_engine=False)
    model = Megatron(
        config=config, transformer_layer_spec=spec, vocab_size=shape.vocab, max_sequence_length=shape.length,
        position_embedding_type="rope", share_embeddings_and_output_weights=True,
    )  # fmt: skip

    def forward(tokens: Tensor, neighbors: Tensor, labels: Tensor | None) -> Tensor:
        B, N = tokens.shape
        retrieved = neighbors.reshape(-1, 2 * M)
        causal = torch.ones(B, 1, N, N, dtype=torch.bool).triu(1)
        masked = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
        positions = torch.arange(N).expand(B, N), torch.arange(2 * M).expand(len(retrieved), 2 * M)
        return model(tokens, positions[0], causal, retrieved, positions[1], masked, labels=labels)

    step = _with_adamw(model, lambda inputs: forward(inputs.tokens, inputs.neighbors, inputs.labels).mean())
    return model, step, _recompute(lambda tokens, neighbors: forward(tokens, neighbors, None))


def _retro_pytorch(shape: Shape) -> tuple[nn.Module, Step, Decode]:
    """Its model file alone: the package imports what prepares its data."""
    package = types.ModuleType("retro_pytorch")
    package.__path__ = [str(FOLDER / "retro_pytorch")]
    retrieval = types.ModuleType("retro_pytorch.retrieval")
    retrieval.BERT_VOCAB_SIZE = shape.vocab  # type: ignore[attr-defined]
    sys.modules |= {"retro_pytorch": package, "retro_pytorch.retrieval": retrieval}
    from retro_pytorch.retro_pytorch import RETRO

    model = RETRO(
        num_tokens=shape.vocab, max_seq_len=shape.length, enc_dim=shape.width, enc_depth=2, enc_cross_attn_layers=(1,),
        dec_depth=shape.layers, dec_cross_attn_layers=tuple(i + 1 for i in shape.cross_layers), heads=shape.heads,
        dec_dim=shape.width, dim_head=shape.width // shape.heads, chunk_size=M,
    )  # fmt: skip

    def loss_of(inputs: Inputs) -> Tensor:
        row = torch.cat((inputs.tokens, inputs.labels[:, -1:]), 1)
        return model(row, inputs.neighbors, return_loss=True)

    return model, _with_adamw(model, loss_of), _recompute(lambda tokens, neighbors: model(tokens, neighbors))


def _gpt2(shape: Shape) -> tuple[nn.Module, Step, Decode]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=shape.vocab, n_positions=shape.length, n_embd=shape.width, n_layer=shape.layers, n_head=shape.heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)

    def loss_of(inputs: Inputs) -> Tensor:
        logits = model(inputs.tokens).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), inputs.labels.flatten())

    def decode(prompts: Tensor, neighbors: Tensor, new: int) -> None:
        past, token = None, prompts
        for _ in range(new):
            out = model(token, past_key_values=past, use_cache=True)
            past, token = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)

    return model, _with_adamw(model, loss_of), decode


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
