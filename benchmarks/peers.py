"""The rivals of `python -m retro_engine.bench model` and `decode`: megatron-core's and retro-pytorch's RETRO, GPT-2.

The first two come from a folder that `make peers` fills with `pip install --no-deps`: only what their model files
import. Each is built in a process of its own (retro_engine/bench/contestants.py).
"""

import contextlib
import importlib.util
import os
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from retro_engine.bench.contestants import Decode, Inputs, K, M, Shape, Step, recompute
from retro_engine.bench.machine import ROOT

FOLDER = Path(os.environ.get("RETRO_PEERS", ROOT / ".peers"))


def missing(name: str) -> str:
    """Why a rival cannot take part; empty = it can."""
    if name == "gpt2":
        return "" if importlib.util.find_spec("transformers") else "transformers is not installed"
    package = {"megatron-core": "megatron", "retro-pytorch": "retro_pytorch"}[name]
    return "" if (FOLDER / package).is_dir() else f"{FOLDER}/{package} is not there: make peers"


def build(name: str, shape: Shape) -> tuple[nn.Module, Step, Decode]:
    sys.path.insert(0, str(FOLDER.resolve()))
    return {"megatron-core": _megatron, "retro-pytorch": _retro_pytorch, "gpt2": _gpt2}[name](shape)


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
    return model, step, recompute(lambda tokens, neighbors: forward(tokens, neighbors, None))


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

    return model, _with_adamw(model, loss_of), recompute(lambda tokens, neighbors: model(tokens, neighbors))


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
