"""GGUF files: tokenizers, optional fields, what is applied and what is refused; hostile bytes are a typed error."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_helpers import HEADS, LAYERS, WIDTH, alphabet, weights, write
from interop_helpers import smollm2
from tokenizer_helpers import CHATML, KINDS, llama2

from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import MissingInputError, StoreError
from retro_engine.generate.chat_template import ChatTemplate
from retro_engine.generate.generator import Generator
from retro_engine.generate.request import Request
from retro_engine.interop.exports import export_model
from retro_engine.interop.gguf_model import read_gguf
from retro_engine.interop.imports import import_model, write_checkpoint
from retro_engine.model.weights import new_model

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
TEXT = "The castle's built in 1302,  by\nAdelheid! 城 é\n\n x"


def logits(path: Path) -> torch.Tensor:
    config, state, *_ = read_gguf(path)
    with torch.no_grad():
        return new_model(config, state, str(path)).eval()(torch.arange(3, 40)[None])


@pytest.mark.parametrize(("pre", "pattern"), [
    ("gpt-2", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"),
    ("smollm", r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"),
    ("llama-bpe", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
    ("qwen2", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
])  # fmt: skip
def test_text_is_split_as_the_file_says(tmp_path: Path, pre: str, pattern: str) -> None:
    regex = pytest.importorskip("regex", reason="regex is not installed")
    tokenizer = read_gguf(write(tmp_path / "x.gguf", tokenizer__ggml__pre=pre))[2]
    said = [piece for piece, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str(TEXT)]
    expected = [found for found in regex.findall(pattern, TEXT)]
    if pre == "smollm":  # every digit is alone before the space before it can be its own
        expected = [part for one in expected for part in regex.findall(r"\p{N}|[^\p{N}]+", one)]
    assert [tokenizer.backend.decoder.decode([piece]) for piece in said] == expected
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.encode("The") == [tokenizer.backend.token_to_id("The")]
    assert tokenizer.end_ids == [2, 0]


def test_sentencepiece(tmp_path: Path) -> None:
    """The ids of the same tokenizer in Hugging Face's form."""
    theirs = llama2()
    vocab = sorted(theirs.backend.get_vocab().items(), key=lambda one: one[1])
    tokens = [token for token, _ in vocab]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
    fields: dict[str, Any] = {
        "tokenizer__ggml__model": "llama", "tokenizer__ggml__tokens": tokens, "tokenizer__ggml__token_type": kinds,
        "tokenizer__ggml__scores": [-float(number) for number in range(len(tokens))], "tokenizer__ggml__merges": None,
    }  # fmt: skip
    found = read_gguf(write(tmp_path / "x.gguf", **fields))[2]
    for text in ("The castle was built", "The castle 城!", " in  by", "a"):
        assert found.decode(found.encode(text)) == text
        assert found.encode(text) == theirs.encode(text), text
    bare = read_gguf(write(tmp_path / "bare.gguf", skip=("token_type",), **fields))[2]
    assert bare.json == found.json
    plain = read_gguf(write(tmp_path / "plain.gguf", tokenizer__ggml__add_space_prefix=False, **fields))[2]
    assert plain.decode(plain.encode("The castle")) == "The castle"
    assert plain.encode(" castle") == theirs.encode("castle")
    with pytest.raises(StoreError, match=r"has no tokenizer\.ggml\.scores"):
        read_gguf(write(tmp_path / "y.gguf", **fields | {"tokenizer__ggml__scores": None}))


def test_optional_fields(tmp_path: Path) -> None:
    whole = read_gguf(write(tmp_path / "whole.gguf"))
    bare = read_gguf(write(tmp_path / "bare.gguf", skip=("token_type", "pre", "context_length")))
    assert bare[2].special_ids == whole[2].special_ids == {0, 1, 2}
    assert "tokenizer.ggml.pre is not said" in bare[3][0]
    assert whole[3] == []
    wide = {
        f"blk.{layer}.attn_{part}.weight": np.zeros((WIDTH, WIDTH), np.float32) for layer in range(2) for part in "kv"
    }
    config = read_gguf(write(tmp_path / "kv.gguf", skip=("head_count_kv",), tensors=wide))[0]
    assert config.key_value_heads == HEADS
    for field, message in (("merges", r"no tokenizer\.ggml\.merges"), ("tokens", r"no tokenizer\.ggml\.tokens")):
        with pytest.raises(StoreError, match=rf"{message}\n.*\n.*--tokenizer PATH"):
            read_gguf(write(tmp_path / "x.gguf", skip=(field,)))
    with pytest.raises(StoreError, match=r"does not say its attention\.head_count"):
        read_gguf(write(tmp_path / "x.gguf", skip=("head_count",)))


def test_a_tokenizer_that_is_given(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", tokenizer__ggml__pre="deepseek-llm", tokenizer__chat_template=CHATML)
    with pytest.raises(StoreError, match=r"tokenizer gpt2 \(deepseek-llm\)\n.*\n.*--tokenizer PATH"):
        import_model(path)
    (tmp_path / "tokenizer.json").write_text(KINDS["byte_level"]().json)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    if tokenizer.vocab_size > 261:
        with pytest.raises(StoreError, match="the embedding has 261 rows"):
            import_model(path, tokenizer=tmp_path)
    given = read_gguf(path, tokenizer)[2]
    assert given is tokenizer
    assert given.chat_files.templates == {"default": CHATML}


def test_a_chat_model(tmp_path: Path) -> None:
    more = {
        "tokenizer__chat_template": CHATML,
        "tokenizer__chat_template__rag": "r",
        "tokenizer__ggml__eot_token_id": 4,
    }
    tokenizer = read_gguf(write(tmp_path / "x.gguf", tokenizer__ggml__bos_token_id=1, **more))[2]
    assert tokenizer.chat_files.templates == {"default": CHATML, "rag": "r"}
    assert tokenizer.chat_files.tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert tokenizer.end_ids == [2, 4, 0]
    with pytest.raises(StoreError, match="eom_token_id=999"):
        read_gguf(write(tmp_path / "y.gguf", tokenizer__ggml__eom_token_id=999))


def test_the_end_of_a_document(tmp_path: Path) -> None:
    """It is what eos says, whatever its name; a turn's end of the type of words is a control token all the same."""
    words = [*alphabet(), "Th", "The"]

    def end(special: list[str], end_token: str | None = None, **more: Any) -> Tokenizer:
        tokens = special + words
        kinds = [3] * len(special) + [1] * len(words)
        more = {"tokenizer__ggml__tokens": tokens, "tokenizer__ggml__token_type": kinds} | more
        return read_gguf(write(tmp_path / "x.gguf", **more), None, end_token)[2]

    assert end(["<fin>", "<a>", "<stop>"]).eod_id == 2
    assert end(["<fin>", "<a>", "<stop>"], "<fin>").eod_id == 0
    for kind in (1, 4):
        turns = end(["<bos>", "<|im_start|>", "<end_of_turn>"], tokenizer__ggml__token_type=[3, 3, kind] + [1] * 258)
        assert turns.eod_id == 2
        assert 2 in turns.special_ids
    with pytest.raises(StoreError, match=r"names the ordinary token 'Th'\n.*\n.*--end-token"):
        end(["<fin>", "<a>", "<stop>"], tokenizer__ggml__eos_token_id=3 + words.index("Th"))


@pytest.mark.parametrize("end_token", [None, "<|endoftext|>"])
def test_an_imported_tokenizer_is_the_same_when_it_is_loaded(tmp_path: Path, end_token: str | None) -> None:
    """Documents, stores and checkpoints agree on it: also after an export, whatever its files name beside it."""
    path = write(tmp_path / "x.gguf", tokenizer__chat_template=CHATML)
    imported = import_model(path, end_token=end_token)
    write_checkpoint(imported, tmp_path / "ours", path)
    export_model(tmp_path / "ours", tmp_path / "theirs")
    marked = "end_of_document" in (tmp_path / "theirs" / "tokenizer.json").read_text()
    assert marked == (end_token is not None)  # eos_token of the export says the other, in its own way
    loaded = [Tokenizer.load(tmp_path / "ours"), import_model(tmp_path / "theirs").tokenizer]
    for tokenizer in (imported.tokenizer, *loaded):
        assert tokenizer.backend.id_to_token(tokenizer.eod_id) == (end_token or "<|im_end|>")
        assert (tokenizer.fingerprint, tokenizer.pad_id) == (imported.tokenizer.fingerprint, imported.tokenizer.pad_id)
        assert tokenizer.end_ids == imported.tokenizer.end_ids == [2, 0]


def reference(path: Path, rotary: int, factors: list[float]) -> torch.Tensor:
    """Logits of the file's llama by its own convention: rotary pairs beside each other, in the first `rotary` features."""
    reader = gguf.GGUFReader(path)
    w = {str(t.name): torch.from_numpy(np.array(t.data, np.float32)) for t in reader.tensors}
    tokens, E = torch.arange(3, 40), WIDTH // HEADS
    angle = torch.outer(torch.arange(37.0), 10000.0 ** (-torch.arange(0, rotary, 2) / rotary) / torch.tensor(factors))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * w[name]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b, rest = x[..., 0:rotary:2], x[..., 1:rotary:2], x[..., rotary:]
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat((torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2), rest), -1)

    x = w["token_embd.weight"][tokens]
    for layer in range(LAYERS):
        name = f"blk.{layer}."
        z = norm(x, name + "attn_norm.weight")
        q, k, v = ((z @ w[f"{name}attn_{part}.weight"].T).unflatten(-1, (-1, E)) for part in "qkv")
        q, k = rotate(q), rotate(k)
        k, v = (one.repeat_interleave(2, 1) for one in (k, v))
        scores = torch.einsum("nhe,she->hns", q, k) / E**0.5
        seen = scores.masked_fill(torch.ones(37, 37).triu(1).bool(), -torch.inf).softmax(-1)
        x = x + torch.einsum("hns,she->nhe", seen, v).flatten(1) @ w[name + "attn_output.weight"].T
        z = norm(x, name + "ffn_norm.weight")
        gate = torch.nn.functional.silu(z @ w[name + "ffn_gate.weight"].T)
        x = x + (gate * (z @ w[name + "ffn_up.weight"].T)) @ w[name + "ffn_down.weight"].T
    return norm(x, "output_norm.weight") @ w["token_embd.weight"].T


@pytest.mark.parametrize(("fields", "tensors", "rotary", "factors"), [
    ({}, {}, 8, [1.0] * 4),
    ({"_rope__dimension_count": 4}, {}, 4, [1.0] * 2),
    ({"_rope__scaling__type": "linear", "_rope__scaling__factor": 4.0}, {}, 8, [4.0] * 4),
    ({"_rope__scaling__factor": 4.0}, {}, 8, [4.0] * 4),
    ({"_rope__scale_linear": 2.0}, {}, 8, [2.0] * 4),
    ({"_rope__scaling__type": "none", "_rope__scaling__factor": 4.0}, {}, 8, [1.0] * 4),
    ({}, {"rope_freqs.weight": np.array([1, 1, 3, 8], np.float32)}, 8, [1.0, 1.0, 3.0, 8.0]),
    ({"_attention__sliding_window": 100, "_expert_count": 0}, {}, 8, [1.0] * 4),
])  # fmt: skip
def test_positions(
    tmp_path: Path, fields: dict[str, Any], tensors: dict[str, Any], rotary: int, factors: list[float]
) -> None:
    path = write(tmp_path / "x.gguf", tensors=tensors, **fields)
    found, expected = logits(path)[0], reference(path, rotary, factors)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max(), (found - expected).abs().max()


@pytest.mark.parametrize(("fields", "message"), [
    ({"_rope__scaling__type": "yarn"}, r"rope\.scaling\.type=yarn"),
    ({"_attention__key_length": 64}, r"attention\.key_length=64"),
    ({"_expert_count": 8}, r"llama\.expert_count=8"),
    ({"_attention__causal": False}, r"attention\.causal=False"),
    ({"_logit_scale": 0.5}, r"llama\.logit_scale=0\.5"),
    ({"_rope__dimension_count": 10}, r"rope\.dimension_count=10"),
    ({"_rope__freq_base": float("nan")}, r"rope\.freq_base=nan"),
    ({"_attention__head_count": "4"}, r"attention\.head_count=4 cannot be used"),
    ({"_attention__head_count": [4, 2]}, r"attention\.head_count="),
    ({"_attention__sliding_window": 16}, "sliding_window=16"),
    ({"_block_count": 1 << 31}, "does not fit its config"),
    ({"_embedding_length": 64}, "has 32 rows"),
    ({"tokenizer__ggml__tokens": ["a", "a"]}, "a token is there twice"),
    ({"tokenizer__ggml__token_type": [1, 2]}, r"token_type is damaged"),
    ({"tokenizer__ggml__merges": ["x y"]}, "is not of its tokens"),
    ({"tokenizer__chat_template": 7}, "chat_template is of no known form"),
    ({"general__alignment": 0}, r"general\.alignment=0"),
])  # fmt: skip
def test_what_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "x.gguf", **fields)
    with pytest.raises(StoreError, match=message):
        read_gguf(path)


def test_qwen2_has_biases_and_no_pairs(tmp_path: Path) -> None:
    config, state, *_ = read_gguf(write(tmp_path / "x.gguf", "qwen2", tokenizer__ggml__pre="qwen2"))
    assert config.has_qk_bias
    assert config.has_v_bias
    assert torch.equal(state["layers.0.attention.q.bias"], torch.from_numpy(weights(261, "qwen2")["blk.0.attn_q.bias"]))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("gguf") / "x.gguf", tokenizer__chat_template=CHATML).read_bytes()


def attempt(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    try:
        config, state, *_ = read_gguf(path)
        new_model(config, state, "it")
    except StoreError as error:
        return str(error)
    return ""


def test_flipped_bytes(tmp_path: Path, small: bytes) -> None:
    """Every one is a typed error, or a file that is as good as the other."""
    random = np.random.default_rng(0)
    header = small.index(b"blk.0") + 2000
    refused = 0
    for _ in range(100):
        data = bytearray(small)
        for place in random.integers(0, header, random.integers(1, 4)):
            data[place] = random.integers(0, 256)
        refused += bool(attempt(tmp_path / "y.gguf", bytes(data)))
    assert refused > 20, refused


def test_cut_files(tmp_path: Path, small: bytes) -> None:
    for length in np.random.default_rng(1).integers(0, len(small) - 1, 60):
        assert attempt(tmp_path / "y.gguf", small[:length]), length


def test_huge_counts(tmp_path: Path, small: bytes) -> None:
    for place in (8, 16):  # tensors, entries
        for count in (1 << 20, 1 << 40, (1 << 64) - 1):
            assert attempt(tmp_path / "y.gguf", small[:place] + count.to_bytes(8, "little") + small[place + 8 :])
    key = small.index(b"tokenizer.ggml.merges") + len(b"tokenizer.ggml.merges") + 8
    assert "do not fit" in attempt(
        tmp_path / "y.gguf", small[:key] + (1 << 50).to_bytes(8, "little") + small[key + 8 :]
    )


@pytest.mark.parametrize("change", ["twice", "over", "beyond"])
def test_tensors_that_cannot_be(tmp_path: Path, small: bytes, change: str) -> None:
    data = bytearray(small)
    first, second = (data.index(name) for name in (b"blk.0.attn_norm.weight", b"blk.0.ffn_norm.weight"))
    offset = {"over": 0, "beyond": 1 << 50}.get(change)
    if offset is None:
        name = b"blk.0.attn_k.weight"
        place = data.index(name)
        data[place : place + len(name)] = b"blk.0.attn_q.weight"
    else:  # name, u32 dimensions, u64, u32 type, u64 offset
        place = second + len(b"blk.0.ffn_norm.weight") + 4 + 8 + 4
        data[place : place + 8] = offset.to_bytes(8, "little")
    assert first
    message = {"twice": "is there twice", "over": "lies over", "beyond": "is cut short"}[change]
    assert message in attempt(tmp_path / "y.gguf", bytes(data))


def test_files_that_are_none(tmp_path: Path) -> None:
    for data in (b"", b"GGUF", b"GGUF" + b"\0" * 64, b"PK\3\4" + b"\0" * 64, b"GGUF\0\0\0\3" + b"\0" * 64):
        assert attempt(tmp_path / "x.gguf", data)
    with pytest.raises(MissingInputError):
        read_gguf(tmp_path / "y.gguf")


def test_smollm2_says_what_the_original_says() -> None:
    path = smollm2()
    config, state, tokenizer, _ = read_gguf(path)
    assert (config.dec_num_layers, config.key_value_heads, config.rotary_base) == (30, 3, 100000.0)
    generator = Generator(new_model(config, state, str(path)).eval(), tokenizer)
    out = generator.generate("The capital of France is", 8)
    assert "Paris" in out.text, out.text
    assert tokenizer.decode(tokenizer.encode("In 1302 it cost $45.")) == "In 1302 it cost $45."
    template = ChatTemplate(tokenizer)
    ids = template.encode([{"role": "user", "content": "What is the capital of France?"}])
    template.close()
    assert len(ids) == 37
    out = generator.generate_all([Request(ids, 32, is_chat=True)])[0]
    assert (out.text, out.finish_reason) == ("The capital of France is Paris.", "stop")
