"""The tokenizer in a GGUF file: byte-level BPE (`gpt2`) split as its `pre` says, and SentencePiece's (`llama`).

Reads `tokenizer.ggml.*`. Each way to split is the regular expression of the model's own tokenizer; one that is not known is
refused by its name, because another would give other tokens silently.
"""

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from retro_engine.data.chat_files import DEFAULT, ChatFiles, named_templates
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import StoreError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

GIVEN = "--tokenizer PATH names a tokenizer.json of the model"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # token_type
GPT2 = ("gpt-2", "default", "mpt", "olmo", "phi-2", "roberta-bpe", "jais")
DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")  # every digit alone, then as GPT-2
LLAMA3 = ("llama-bpe", "llama-v3", "llama3", "dbrx", "smaug-bpe", "falcon3", "pixtral")  # numbers by three digits
QWEN2 = ("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez")  # as Llama 3, every digit alone
PRES = (*GPT2, *DIGITS, *LLAMA3, *QWEN2)
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENDS = ("eos", "eot", "eom")
NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
CONTROL_NAME = re.compile(r"<\|[^|<>\s]+\|>|</?s>|<unk>|<pad>|<bos>|<eos>|<(?:start|end)_of_turn>")
BYTE_NAME = re.compile(r"<0x[0-9A-F]{2}>")
LONGEST = 512  # characters of a SentencePiece token: merges are found by trying every cut


def gguf_tokenizer(fields: dict[str, Any], name: str, end_token: str | None = None) -> tuple[Tokenizer, list[str]]:
    """The tokenizer, and notes for the user; `end_token` ends a document (None: what the file says).

    Raises StoreError for a tokenizer that is not known or damaged.
    """
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if kind not in ("gpt2", "llama") or (kind == "gpt2" and pre not in PRES):
        known = f"known in GGUF: llama, and gpt2 with {', '.join(PRES)}"
        raise StoreError(f"{name} has the tokenizer {kind} ({pre})", known, GIVEN)
    tokens = _tokens(fields, name)
    kinds = _kinds(fields, tokens, name)
    backend = _byte_level(fields, tokens, pre, name) if kind == "gpt2" else _sentencepiece(fields, tokens, kinds, name)
    _add_special(backend, tokens, kinds)
    end = _special_ids(fields, tokens, name).get("eos")
    tokenizer = Tokenizer(backend.to_str(), name, end_token, None if end is None else (end, f"{name}: eos_token_id"))
    tokenizer.chat_files = gguf_chat(fields, name)
    is_said = kind == "llama" or pre != "default"
    notes = [] if is_said else ["tokenizer.ggml.pre is not said: text is split as GPT-2's; --tokenizer names another"]
    return tokenizer, notes


def gguf_chat(fields: dict[str, Any], name: str) -> ChatFiles:
    """Chat templates, special tokens by name, and the ids that end a text, a turn or a message."""
    begin = "tokenizer.chat_template"
    templates = {
        key.removeprefix(f"{begin}.") if key != begin else DEFAULT: value
        for key, value in fields.items()
        if key == begin or key.startswith(f"{begin}.")
    }
    tokens = _tokens(fields, name) if "tokenizer.ggml.tokens" in fields else []
    ids = _special_ids(fields, tokens, name)
    named = {ours: tokens[ids[key]] for ours, key in NAMES.items() if key in ids}
    return ChatFiles(
        named_templates(templates or None, name), named, tuple(dict.fromkeys(ids[k] for k in ENDS if k in ids))
    )


def _special_ids(fields: dict[str, Any], tokens: list[str], name: str) -> dict[str, int]:
    found = {}
    for key in (*ENDS, "bos", "unknown", "padding"):
        index = fields.get(f"tokenizer.ggml.{key}_token_id")
        if index is None or index == 0xFFFFFFFF:  # llama.cpp's "none"
            continue
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(tokens):
            raise StoreError(
                f"{name}: {key}_token_id={str(index)[:40]}", f"it is none of its {len(tokens)} tokens", GIVEN
            )
        found[key] = index
    return found


def _tokens(fields: dict[str, Any], name: str) -> list[str]:
    tokens = fields.get("tokenizer.ggml.tokens")
    if not _is_texts(tokens) or not tokens:
        raise StoreError(f"{name} has no tokenizer.ggml.tokens", "its vocabulary is a list of texts", GIVEN)
    if len(set(tokens)) < len(tokens):
        raise StoreError(f"{name}: a token is there twice", "tokenizer.ggml.tokens has each once", GIVEN)
    return list(tokens)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _numbers(fields: dict[str, Any], key: str, count: int, name: str) -> np.ndarray | None:
    """An array of the metadata with a number a token; None where there is none."""
    found = fields.get(key)
    if found is None:
        return None
    if not isinstance(found, np.ndarray) or len(found) != count:
        raise StoreError(f"{name}: {key} is damaged", f"expected {count} numbers", GIVEN)
    return found


def _kinds(fields: dict[str, Any], tokens: list[str], name: str) -> list[int]:
    """token_type of each token; the specification lets it be missing: then names and ids say what is a control token."""
    found = _numbers(fields, "tokenizer.ggml.token_type", len(tokens), name)
    named = list(_special_ids(fields, tokens, name).values())
    if found is None:
        kinds = [CONTROL if _is_control(token) else BYTE if BYTE_NAME.fullmatch(token) else NORMAL for token in tokens]
    else:  # files are about whose token_type tells that a turn's end is a word: their own eos says that it is none
        kinds, named = [int(kind) for kind in found], [index for index in named if _is_control(tokens[index])]
    for index in named:
        kinds[index] = UNKNOWN if kinds[index] == UNKNOWN else CONTROL
    return kinds


def _is_control(token: str) -> bool:
    return CONTROL_NAME.fullmatch(token) is not None


def _byte_level(fields: dict[str, Any], tokens: list[str], pre: str, name: str) -> "Backend":
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    lines = fields.get("tokenizer.ggml.merges")
    if not _is_texts(lines):
        raise StoreError(f"{name} has no tokenizer.ggml.merges", "without them text would fall into bytes", GIVEN)
    assert isinstance(lines, list)
    merges = [(a, b) for a, _, b in (merge.partition(" ") for merge in lines)]
    vocab = {token: number for number, token in enumerate(tokens)}
    odd = next((f"{a} {b}" for a, b in merges if a not in vocab or b not in vocab or a + b not in vocab), None)
    if odd is not None:
        raise StoreError(f"{name}: merge {odd[:80]!r} is not of its tokens", "tokenizer.ggml.merges is damaged", GIVEN)
    backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in LLAMA3))
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in DIGITS:
        split = [pre_tokenizers.Digits(individual_digits=True), by_bytes]
    elif pre in (*LLAMA3, *QWEN2):
        pattern = SPLIT % ("{1,3}" if pre in LLAMA3 else "")
        split = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    else:
        split = [by_bytes]
    if pre in QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(split)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(fields: dict[str, Any], tokens: list[str], kinds: list[int], name: str) -> "Backend":
    """SentencePiece's BPE joins the neighbors whose union has the best score; what has no token falls into bytes."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    scores = _numbers(fields, "tokenizer.ggml.scores", len(tokens), name)
    if scores is None:
        raise StoreError(f"{name} has no tokenizer.ggml.scores", "they order the merges", GIVEN)
    if any(len(token) > LONGEST for token in tokens):
        raise StoreError(f"{name}: a token has more than {LONGEST} characters", "it is no word's part", GIVEN)
    vocab = {token: number for number, token in enumerate(tokens)}
    unknown = next((t for t, kind in zip(tokens, kinds) if kind == UNKNOWN), "<unk>" if "<unk>" in vocab else None)
    model = models.BPE(
        vocab=vocab,
        merges=_merges(tokens, kinds, scores, vocab),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=all(f"<0x{byte:02X}>" in vocab for byte in range(256)),
    )
    backend = Backend(model)
    has_prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", "\u2581")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces] if has_prefix else [spaces])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if has_prefix else parts)
    return backend


def _merges(tokens: list[str], kinds: list[int], scores: np.ndarray, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every cut of a token into two others, the best score first."""
    found = []
    for number, (token, kind) in enumerate(zip(tokens, kinds)):
        if kind != NORMAL:
            continue
        cuts = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]
        cuts.sort(key=lambda cut: (vocab[cut[0]], vocab[cut[1]]))
        found += [(-float(scores[number]), cut) for cut in cuts]
    found.sort(key=lambda one: one[0])  # stable: of one score, in the order of the tokens
    return [cut for _, cut in found]


def _add_special(backend: "Backend", tokens: list[str], kinds: list[int]) -> None:
    from tokenizers import AddedToken

    control = (CONTROL, UNKNOWN)
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, kinds) if k in control and t]
    )
    backend.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, kinds) if k == USER_DEFINED and t])
