"""Text to token ids and back: trains byte-level BPE, loads tokenizer.json and GPT-2's encoder.json + vocab.bpe.

The work is Hugging Face tokenizers'. Text never becomes a special token, whatever it contains; `encode_controlled` is for
what a chat template wrote.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from retro_engine.data.chat_files import ChatFiles, read_chat_files
from retro_engine.errors import MissingInputError, StoreError, UsageError

EOD = "<|endoftext|>"
PAD = "<|pad|>"
EOD_NAMES = (EOD, "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[SEP]")
BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]")
PAD_NAMES = (PAD, "<pad>", "[PAD]", "<|finetune_right_pad_id|>")
FILE = "tokenizer.json"
FEW = 8  # rows that are decoded without waking the library's threads: they cost more than they save
LONG = 4096  # characters; a longer text is encoded where other threads of Python go on meanwhile


class Tokenizer:
    """A tokenizer with an end-of-document id `eod_id` and a padding id `pad_id` (eod_id where it has none)."""

    def __init__(self, serialized: str, name: str = "tokenizer"):
        """Raises StoreError when `serialized` is not a tokenizer.json or has no end-of-document token."""
        from tokenizers import Tokenizer as Backend

        try:
            self.backend = Backend.from_str(serialized)
        except Exception as error:  # the library raises bare Exception
            raise StoreError(
                f"{name} is not a tokenizer.json", str(error).splitlines()[0], "train one: --tokenizer auto"
            ) from error
        self.backend.no_padding()
        self.backend.no_truncation()
        self.backend.encode_special_tokens = True  # "<|endoftext|>" in a text is text
        self.json = self.backend.to_str()
        self.vocab_size = max(self.backend.get_vocab().values(), default=-1) + 1
        eod = next((i for i in map(self.backend.token_to_id, EOD_NAMES) if i is not None), None)
        if eod is None:
            raise StoreError(f"{name} has no end-of-document token", f"expected one of {', '.join(EOD_NAMES)}")
        self.eod_id: int = eod
        pad = next((i for i in map(self.backend.token_to_id, PAD_NAMES) if i is not None), None)
        self.pad_id: int = eod if pad is None else pad
        self.bos_id: int | None = next((i for i in map(self.backend.token_to_id, BOS_NAMES) if i is not None), None)
        self._controlled: Backend | None = None
        self._pieces: dict[int, str] = {}
        self.chat_files = ChatFiles()  # what lies beside it

    @property
    def end_ids(self) -> list[int]:
        """Any of them ends a text that is generated: `eod_id`, and what the model's own files name."""
        named = self.chat_files.tokens.get("eos_token")
        ids = (*self.chat_files.end_ids, None if named is None else self.backend.token_to_id(named), self.eod_id)
        return [i for i in dict.fromkeys(ids) if i is not None]

    @functools.cached_property
    def unknown_id(self) -> int | None:
        """The token that stands for what the vocabulary lacks."""
        model = json.loads(self.json)["model"]
        token = model.get("unk_token")
        found = self.backend.token_to_id(token) if isinstance(token, str) else model.get("unk_id")
        return found if isinstance(found, int) and found < self.vocab_size else None

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.json.encode()).hexdigest()

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        """The smallest type that holds every id."""
        return np.uint16 if self.vocab_size < 1 << 16 else np.uint32

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """A tokenizer.json, or a folder with one, or with encoder.json + vocab.bpe (vocab.json + merges.txt).

        Of a folder also the chat template and the tokens that end a text (`chat_files`).
        """
        tokenizer = cls._load(Path(path))
        if Path(path).is_dir():
            tokenizer.chat_files = read_chat_files(Path(path))
        return tokenizer

    @classmethod
    def _load(cls, path: Path) -> "Tokenizer":
        if path.is_dir():
            pairs = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
            for vocab, merges in pairs:
                if not (path / FILE).is_file() and (path / vocab).is_file() and (path / merges).is_file():
                    return cls.from_gpt2(path / vocab, path / merges)
            path = path / FILE
        try:
            serialized = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise MissingInputError(
                f"{path} does not exist", "expected a tokenizer.json", "--tokenizer auto trains one"
            ) from error
        except UnicodeDecodeError as error:
            raise StoreError(f"{path} is not a tokenizer.json", "it is not UTF-8") from error
        except OSError as error:
            raise MissingInputError(f"{path} cannot be read", error.strerror or "") from error
        return cls(serialized, str(path))

    @classmethod
    def from_gpt2(cls, vocab_path: Path, merges_path: Path) -> "Tokenizer":
        """GPT-2's vocabulary (JSON) and merges (text)."""
        from tokenizers import AddedToken, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Backend

        try:
            vocab = json.loads(vocab_path.read_text(encoding="utf-8"))
            lines = merges_path.read_text(encoding="utf-8").splitlines()
            merges = [
                (line.split(" ")[0], line.split(" ")[1]) for line in lines if line and not line.startswith("#version")
            ]
            backend = Backend(models.BPE(vocab=vocab, merges=merges))
        except (ValueError, IndexError, OSError) as error:
            raise StoreError(f"{vocab_path} and {merges_path} do not load", str(error)) from error
        except Exception as error:  # the library raises bare Exception for merges outside the vocabulary
            raise StoreError(f"{vocab_path} and {merges_path} do not fit", str(error)) from error
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(EOD, special=True)])
        return cls(backend.to_str(), str(vocab_path))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Byte-level BPE of at most `vocab_size` entries, the 256 bytes and two special tokens included."""
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers, trainers

        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if vocab_size < len(alphabet) + 2:
            raise UsageError(
                f"vocab_size={vocab_size} is too small", f"the bytes and special tokens need {len(alphabet) + 2}"
            )
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[EOD, PAD], initial_alphabet=sorted(alphabet), show_progress=False
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend.to_str())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if len(texts) == 1 and len(texts[0]) <= LONG:  # without waking the library's threads
            return [self.backend.encode(texts[0], add_special_tokens=False).ids]
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and, for each, the characters [start, end) it stands for."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def encode_after(self, prompt: str, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The same of a text that follows another: not what begins a text, where tokenizers tell the two apart."""
        ids, offsets = self.encode_with_offsets(prompt + text)
        before = self.encode(prompt)
        if ids[: len(before)] != before:  # a token lies across the boundary
            return self.encode_with_offsets(text)
        places = [(max(0, start - len(prompt)), max(0, end - len(prompt))) for start, end in offsets[len(before) :]]
        return ids[len(before) :], places

    def special_id(self, text: str) -> int | None:
        """The id of a special token that is written so."""
        index = self.backend.token_to_id(text)
        return index if index is not None and index in self.special_ids else None

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the control tokens, which decoding leaves out."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def encode_controlled(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text whose special tokens are control tokens, and for each id its characters [start, end).

        For what the model's own template wrote, never for what a user did.
        """
        if self._controlled is None:  # a second one: the switch of the first is read by other threads
            from tokenizers import Tokenizer as Backend

            self._controlled = Backend.from_str(self.json)
            self._controlled.encode_special_tokens = False
        encoding = self._controlled.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each token alone adds to a text before it. Half a character is U+FFFD.

        Tokenizers like SentencePiece's drop the space of what comes first, so each is decoded after another token.
        """
        missing = [i for i in dict.fromkeys(ids) if i not in self._pieces]
        if missing:
            before = self.decode(self._anchor)
            texts = self.decode_batch([[*self._anchor, i] for i in missing])
            self._pieces |= {i: text[common(before, text) :] for i, text in zip(missing, texts)}
        return [self._pieces[i] for i in ids]

    def within(self, ids: Sequence[int]) -> str:
        """The text of tokens after whatever text."""
        before, text = self.decode(self._anchor), self.decode([*self._anchor, *ids])
        return text[common(before, text) :]

    @functools.cached_property
    def _anchor(self) -> list[int]:
        return self.encode("a")[-1:]

    def decode_batch(self, rows: list[list[int]]) -> list[str]:
        if len(rows) <= FEW:
            return [self.backend.decode(row, skip_special_tokens=True) for row in rows]
        return self.backend.decode_batch(rows, skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each token [V], 0 for special ones, 1 for the unknown one: what bits per byte divides by.

        They do not sum to a text's own bytes where the tokenizer loses some; evaluate.perplexity.own_bytes sees to it.
        """
        special = {index for index, token in self.backend.get_added_tokens_decoder().items() if token.special}
        is_byte_level = '"ByteLevel"' in str(json.loads(self.json).get("decoder")).replace("'", '"')
        lengths = np.zeros(self.vocab_size, np.int64)
        for token, index in self.backend.get_vocab().items():
            if index in special:
                continue
            if is_byte_level:
                lengths[index] = len(token)  # one character a byte
            elif token.startswith("<0x") and token.endswith(">"):
                lengths[index] = 1
            else:
                lengths[index] = len(token.replace("\u2581", " ").removeprefix("##").encode())
        if self.unknown_id is not None:
            lengths[self.unknown_id] = 1
        return lengths


def common(one: str, other: str) -> int:
    """Characters that both begin with; `one` is nearly always all of it."""
    if other.startswith(one):
        return len(one)
    return next((place for place, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def auto_vocab_size(num_bytes: int) -> int:
    """Entries for a corpus of `num_bytes`: 8k under 10 MB, 16k under 100 MB, else 32k."""
    return 8192 if num_bytes < 10_000_000 else 16384 if num_bytes < 100_000_000 else 32768
