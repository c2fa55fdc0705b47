"""The files that a tokenizer comes in: tokens that were added, GPT-2's pair, and what is not read.

Hugging Face's: tokenizer_config.json, special_tokens_map.json, added_tokens.json; vocab.json + merges.txt, encoder.json + vocab.bpe.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retro_engine.data.inputs import read_bounded, shown
from retro_engine.errors import MissingInputError, StoreError, UsageError

TOKENIZER = "tokenizer.json"
PAIRS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
MAX_BYTES = 1 << 29  # of a tokenizer's file: the largest known have 35 MB
TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json")  # they name tokens
BYTE_CLASSES = ("GPT2", "Roberta", "Bart", "CodeGen", "Longformer", "LED", "Blenderbot", "Whisper", "MVP", "Deberta")
NOT_READ = {  # what else a folder may hold, and whose it is
    "tokenizer.model": "SentencePiece's",
    "spiece.model": "SentencePiece's",
    "sentencepiece.bpe.model": "SentencePiece's",
    "vocab.txt": "BERT's",
    "tiktoken.model": "tiktoken's",
    "tekken.json": "Mistral's",
    "vocab.json": "half of GPT-2's pair",
    "merges.txt": "half of GPT-2's pair",
}
CONVERT = (
    "python -c \"from transformers import AutoTokenizer as A; A.from_pretrained('FOLDER').save_pretrained('OUT')\" "
    "writes a tokenizer.json"
)


def called(name: str, function: Callable[..., Any], *values: Any, **named: Any) -> Any:
    """What a call into the tokenizers library gives. Raises StoreError for what it raises: a bare Exception, or the panic
    of its Rust side, which is no Exception.
    """
    try:
        return function(*values, **named)
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        why = (str(error).strip().split("\n") or [""])[0]
        raise StoreError(
            f"{name} is not a tokenizer.json that can be used", why, "train one: --tokenizer auto"
        ) from error


def read_text(path: Path) -> str:
    """Raises MissingInputError or StoreError."""
    try:
        return read_bounded(path, MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StoreError(
            f"{shown(path)} is not UTF-8", f"at byte {error.start}", "convert it, or copy it anew"
        ) from error
    except UsageError as error:
        raise StoreError(error.what, error.why) from error


def read_object(path: Path) -> dict[str, Any]:
    """Raises MissingInputError or StoreError."""
    try:
        values = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{shown(path)} is not JSON", str(error)) from error
    if not isinstance(values, dict):
        raise StoreError(f"{shown(path)} holds no settings", f"it is a {type(values).__name__}, not an object")
    return values


def find(path: Path) -> Path | tuple[Path, Path]:
    """The tokenizer.json, or the pair of files, that `path` names: a folder or a file.

    Raises MissingInputError where nothing is, StoreError for what is there and not read.
    """
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and (path / TOKENIZER).exists():
        return path / TOKENIZER
    for vocab, merges in PAIRS:
        is_named = path.is_dir() or path.name in (vocab, merges)
        if is_named and (folder / vocab).is_file() and (folder / merges).is_file():
            return folder / vocab, folder / merges
    if not path.is_dir():
        if path.name in NOT_READ or path.suffix in (".model", ".tiktoken"):
            raise _not_read(path)
        return path
    other = next((path / name for name in NOT_READ if (path / name).is_file()), None)
    other = other or next(iter(sorted(path.glob("*.tiktoken"))), None)
    if other is not None:
        raise _not_read(other)
    why = f"expected a {TOKENIZER}, or {' or '.join(' + '.join(pair) for pair in PAIRS)}"
    raise MissingInputError(f"{shown(path)} has no tokenizer", why, "--tokenizer auto trains one")


def _not_read(path: Path) -> StoreError | MissingInputError:
    if not path.exists():
        return MissingInputError(
            f"{shown(path)} does not exist", f"expected a {TOKENIZER}", "--tokenizer auto trains one"
        )
    whose = NOT_READ.get(path.name, "SentencePiece's" if path.suffix == ".model" else "tiktoken's")
    return StoreError(f"{shown(path)} is {whose} file, which is not read", f"a {TOKENIZER} is", CONVERT)


def _value(path: Path, key: str) -> Any:
    return read_object(path).get(key) if path.is_file() else None


def added_tokens(folder: Path) -> list[dict[str, Any]]:
    """Tokens that were added to a vocabulary, in the order of their ids, as tokenizer.json has them.

    added_tokens.json has ids alone: special are those that the other files name as special.
    """
    config = _value(folder / "tokenizer_config.json", "added_tokens_decoder") or {}
    named = set()
    for name in TOKEN_FILES:
        values = read_object(folder / name) if (folder / name).is_file() else {}
        for key, value in values.items():
            if key.endswith("_token") or key == "additional_special_tokens":
                parts = value if isinstance(value, list) else [value]
                named |= {part.get("content") if isinstance(part, dict) else part for part in parts if part}
    found: dict[str, dict[str, Any]] = {}
    path = folder / "added_tokens.json"
    for content, number in (read_object(path) if path.is_file() else {}).items():
        found[content] = {"id": number, "content": content, "special": content in named}
    for number, value in config.items():
        if not isinstance(value, dict) or not isinstance(value.get("content"), str) or not str(number).isdecimal():
            raise StoreError(f"{shown(folder / TOKEN_FILES[0])}: added_tokens_decoder cannot be read", f"at {number}")
        found[value["content"]] = {**value, "id": int(number), "special": bool(value.get("special", False))}
    for token in found.values():
        if isinstance(token["id"], bool) or not isinstance(token["id"], int) or token["id"] < 0:
            raise StoreError(f"{shown(path)}: {token['content']!r} has no id", f"it is {str(token['id'])[:40]}")
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    return [
        {**flags, "normalized": not token["special"], **token}
        for token in sorted(found.values(), key=lambda token: int(token["id"]))
    ]


def from_pair(vocab_path: Path, merges_path: Path) -> str:
    """GPT-2's vocabulary (JSON) and merges (text) with the tokens that were added, as tokenizer.json."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    name = f"{shown(vocab_path)} and {shown(merges_path)}"
    vocab = read_object(vocab_path)
    lines = read_text(merges_path).split("\n")  # no other sign ends a line
    pairs = [line.rstrip("\r").split(" ") for line in lines[lines[0].startswith("#version") :] if line.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise StoreError(f"{name} do not load", "a line of merges is not two parts with a space between")
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 1 << 31 for i in vocab.values()):
        raise StoreError(f"{name} do not load", "an id is no number below 2,147,483,648")
    missing = [letter for letter in pre_tokenizers.ByteLevel.alphabet() if letter not in vocab]
    config = read_object(vocab_path.parent / TOKEN_FILES[0]) if (vocab_path.parent / TOKEN_FILES[0]).is_file() else {}
    kind = str(config.get("tokenizer_class") or "GPT2Tokenizer")
    if not kind.startswith(BYTE_CLASSES) or len(missing) > len(pre_tokenizers.ByteLevel.alphabet()) // 2:
        why = f"a {kind} cuts text in its own way" if not missing else f"{len(missing)} of the 256 bytes have no token"
        raise StoreError(f"{name} are not GPT-2's", why, CONVERT)
    added = added_tokens(vocab_path.parent)
    for token in added:
        if vocab.setdefault(token["content"], token["id"]) != token["id"]:
            raise StoreError(f"{name}: {token['content']!r} has two ids", f"{token['id']} was added")
    backend = called(name, lambda: Backend(models.BPE(vocab=vocab, merges=[(pair[0], pair[1]) for pair in pairs])))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
    backend.decoder = decoders.ByteLevel()
    values = json.loads(backend.to_str())
    values["added_tokens"] = added
    return json.dumps(values)
