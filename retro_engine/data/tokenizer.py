"""Text to token ids and back: trains byte-level BPE, loads tokenizer.json and GPT-2's encoder.json + vocab.bpe.

The work is Hugging Face tokenizers'. Text never becomes a special token, whatever it contains; `encode_controlled` is for
what a chat template wrote.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retro_engine.data.chat_files import ChatFiles, read_chat_files, said_end
from retro_engine.data.inputs import shown
from retro_engine.data.tokenizer_files import called, find, from_pair, read_text
from retro_engine.errors import StoreError, UsageError, nearest

EOD = "<|endoftext|>"
PAD = "<|pad|>"
EOD_NAMES = (
    *(EOD, "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[SEP]"),
    *("<｜end▁of▁sentence｜>", "[EOS]", "<|eot_id|>", "<|END_OF_TURN_TOKEN|>"),
)
END_MARK = "end_of_document"  # beside an added token of tokenizer.json: the library passes over what it does not know
MAX_ID = 1 << 24  # of a token: arrays over the vocabulary are made
BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]")
PAD_NAMES = (PAD, "<pad>", "[PAD]", "<|finetune_right_pad_id|>")
FILE = "tokenizer.json"
_MEMBER = re.compile(r'[\s{,]*("(?:[^"\\]|\\.)*")\s*:\s*')  # the name of an object's next value
FEW = 8  # rows that are decoded without waking the library's threads: they cost more than they save
LONG = 4096  # characters; a longer text is encoded where other threads of Python go on meanwhile


class Tokenizer:
    """A tokenizer with an end-of-document id `eod_id` and a padding id `pad_id` (eod_id where it has none)."""

    def __init__(
        self,
        serialized: str,
        name: str = "tokenizer",
        end_token: str | int | None = None,
        said_end: tuple[str | int, str] | None = None,
    ):
        """`end_token` ends a document; None = what `serialized` is marked with, else `said_end` (and by which file), else
        the first of EOD_NAMES that there is.

        Raises StoreError when `serialized` is not a tokenizer.json or has no such token.
        """
        from tokenizers import Tokenizer as Backend

        self.name = name
        self.backend = _whole(name, called(name, Backend.from_str, serialized), serialized)
        self.backend.no_padding()
        self.backend.no_truncation()
        self.backend.encode_special_tokens = True  # "<|endoftext|>" in a text is text
        vocabulary = self.backend.get_vocab()
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if self.vocab_size > MAX_ID:
            raise StoreError(f"{name} has ids up to {self.vocab_size - 1:,}", f"{len(vocabulary):,} entries have ids")
        self.num_holes = self.vocab_size - len(set(vocabulary.values()))
        by_name = next((i for i in map(self.backend.token_to_id, EOD_NAMES) if i is not None), None)
        self.eod_id: int = self._find_end(end_token, _marked(serialized), said_end, by_name)
        self._is_marked = self.eod_id != by_name
        if self._is_marked:
            self._make_special(self.eod_id)
        eod = self.eod_id
        pad = next((i for i in map(self.backend.token_to_id, PAD_NAMES) if i is not None), None)
        self.pad_id: int = eod if pad is None else pad
        self.bos_id: int | None = next((i for i in map(self.backend.token_to_id, BOS_NAMES) if i is not None), None)
        self._controlled: Backend | None = None
        self._pieces: dict[int, str] = {}
        self.chat_files = ChatFiles()  # what lies beside it

    @functools.cached_property
    def json(self) -> str:
        """As tokenizer.json."""
        return self._serialized(self._is_marked)

    @property
    def sink_id(self) -> int:
        """What stands before neighbors that a decoder reads in front: the token that texts began with in its training, else
        the one that ended them, which the next text came after.
        """
        ends = map(self.special_id, EOD_NAMES)  # those of documents come before those of turns
        return next((i for i in (self.bos_id, *ends) if i is not None), self.eod_id)

    @property
    def end_ids(self) -> list[int]:
        """Any of them ends a text that is generated: what the model's own files name, `eod_id`, and special tokens that
        have an end's name (an instruct model ends turns with one and documents with another).
        """
        named = self.chat_files.tokens.get("eos_token")
        ids = (*self.chat_files.end_ids, None if named is None else self.backend.token_to_id(named), self.eod_id)
        known = map(self.special_id, EOD_NAMES)
        return [i for i in dict.fromkeys((*ids, *known)) if i is not None]

    def _find_end(
        self,
        end_token: str | int | None,
        marked: str | None,
        said_end: tuple[str | int, str] | None,
        by_name: int | None,
    ) -> int:
        """Raises StoreError where no token is named, or one that is not there or that text could become."""
        by = "--end-token" if end_token is not None else self.name
        wanted = end_token if end_token is not None else marked
        if wanted is None and said_end is not None:
            wanted, by = said_end
            if isinstance(wanted, int) and by_name is not None and not self._is_special(wanted):
                wanted = None  # configurations are often written with the ids of another tokenizer
        if wanted is None:
            if by_name is None:
                why = f"expected one of {', '.join(EOD_NAMES)}, or a file beside it that says which"
                raise StoreError(f"{self.name} has no end-of-document token", why, "--end-token TOKEN names it")
            return by_name
        found = self.backend.token_to_id(wanted) if isinstance(wanted, str) else wanted
        content = None if found is None or found >= self.vocab_size else self.backend.id_to_token(found)
        if found is None or content is None:
            close = nearest(str(wanted), list(self.backend.get_vocab()))
            what = f"{by} names the end-of-document token {wanted!r}"
            raise StoreError(what, f"{self.name} has none such", close or "--end-token TOKEN names another")
        is_text = found in called(self.name, self.backend.encode, content, add_special_tokens=False).ids
        if is_text and not self._is_special(found):
            why = "text that holds it would end the document"
            raise StoreError(f"{by} names the ordinary token {content!r}", why, "--end-token TOKEN names another")
        return found

    def _is_special(self, index: int) -> bool:
        token = self.backend.get_added_tokens_decoder().get(index)
        return token is not None and token.special

    def json_beside(self, eos_token: str | None) -> str:
        """As it is written beside files that name `eos_token` (None: any): the mark stands above what they name, and is
        left out where that is the end, because transformers reports what it does not know.
        """
        if eos_token == self.backend.id_to_token(self.eod_id):
            return self._serialized(is_marked=False)
        is_alone = self.chat_files == ChatFiles() or not self._is_special(self.eod_id)
        return self.json if is_alone else self._serialized(is_marked=True)

    def _serialized(self, is_marked: bool) -> str:
        """As tokenizer.json; the end of document is marked where its name does not tell."""
        if not is_marked:
            return str(self.backend.to_str())
        self._make_special(self.eod_id)
        whole = str(self.backend.to_str(pretty=True))
        if type(self.backend.model).__name__ == "Unigram":  # its scores: two libraries write numbers in two ways
            whole = json.dumps(json.loads(whole), ensure_ascii=False, indent=2)
        cut = whole.index(',\n  "model": {')  # the last and largest part; a line break in a text would be escaped
        values = json.loads(f"{whole[:cut]}}}")
        for token in values["added_tokens"]:
            if token["id"] == self.eod_id:
                token[END_MARK] = True
        return json.dumps(values, ensure_ascii=False, indent=2).removesuffix("\n}") + whole[cut:]

    def _make_special(self, index: int) -> None:
        from tokenizers import AddedToken

        if not self._is_special(index):
            self.backend.add_special_tokens(
                [AddedToken(self.backend.id_to_token(index), special=True, normalized=False)]
            )

    @functools.cached_property
    def unknown_id(self) -> int | None:
        """The token that stands for what the vocabulary lacks."""
        token = getattr(self.backend.model, "unk_token", None)  # but for Unigram, which has an id
        is_unigram = type(self.backend.model).__name__ == "Unigram"
        found = (
            json.loads(self.json)["model"].get("unk_id") if is_unigram else token and self.backend.token_to_id(token)
        )
        return found if isinstance(found, int) and found < self.vocab_size else None

    @functools.cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.json.encode()).hexdigest()

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        """The smallest type that holds every id."""
        return np.uint16 if self.vocab_size < 1 << 16 else np.uint32

    @classmethod
    def load(cls, path: str | Path, end_token: str | None = None) -> "Tokenizer":
        """A tokenizer.json, or a folder with one, or with encoder.json + vocab.bpe (vocab.json + merges.txt).

        The end of document is `end_token`, or what the files beside it say. Of a folder also the chat template and the
        tokens that end a text (`chat_files`).
        """
        found = find(Path(path))
        if isinstance(found, tuple):
            tokenizer = cls.from_gpt2(*found, end_token)
        else:
            tokenizer = cls(read_text(found), shown(found), end_token, said_end(found.parent))
        if Path(path).is_dir():
            tokenizer.chat_files = read_chat_files(Path(path))
        return tokenizer

    @classmethod
    def from_gpt2(cls, vocab_path: Path, merges_path: Path, end_token: str | None = None) -> "Tokenizer":
        """GPT-2's vocabulary (JSON) and merges (text), with the tokens that files beside them add."""
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Backend

        name = shown(vocab_path)
        backend = _whole(
            name, called(name, Backend.from_str, serialized := from_pair(vocab_path, merges_path)), serialized
        )
        said = said_end(vocab_path.parent)
        if said is not None and isinstance(said[0], str) and backend.token_to_id(said[0]) is not None:
            backend.add_special_tokens([AddedToken(said[0], special=True, normalized=False)])
        elif end_token is None and said is None:
            known = next((token for token in EOD_NAMES if backend.token_to_id(token) is not None), EOD)
            backend.add_special_tokens([AddedToken(known, special=True)])
        return cls(backend.to_str(), name, end_token, said)

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
            rows = [called(self.name, self.backend.encode, texts[0], add_special_tokens=False).ids]
        else:
            encodings = called(self.name, self.backend.encode_batch_fast, list(texts), add_special_tokens=False)
            rows = [encoding.ids for encoding in encodings]
        if not self._matched:
            return rows
        return [
            row if self._matched.isdisjoint(row) else self.encode_with_offsets(text)[0]
            for row, text in zip(rows, texts)
        ]

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and, for each, the characters [start, end) it stands for."""
        encoding = called(self.name, self.backend.encode, text, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        if self._matched.isdisjoint(ids):
            return ids, offsets
        found: list[tuple[int, tuple[int, int]]] = []
        for index, (start, end) in zip(ids, offsets):
            if index not in self._matched or end - start < 2:
                found.append((index, (start, end)))
                continue
            for first, last in ((start, start + 1), (start + 1, end)):  # its first sign alone is no longer its name
                parts = zip(*self.encode_after("a", text[first:last]))
                found += [(i, (first + begin, first + stop)) for i, (begin, stop) in parts]
        return [index for index, _ in found], [place for _, place in found]

    @functools.cached_property
    def _matched(self) -> frozenset[int]:
        """Special tokens that the model itself finds in text: Unigram and whole words have their names in the vocabulary."""
        decoder = self.backend.get_added_tokens_decoder()
        names = {i: decoder[i].content for i in self.special_ids if i != self.unknown_id}
        rows = called(self.name, self.backend.encode_batch_fast, list(names.values()), add_special_tokens=False)
        return frozenset(i for row in rows for i in row.ids) & names.keys()

    def encode_after(
        self, prompt: str, text: str, is_controlled: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The same of a text that follows another: not what begins a text, where tokenizers tell the two apart."""
        encode = self.encode_controlled if is_controlled else self.encode_with_offsets
        ids, offsets = encode(prompt + text)
        before = self.encode(prompt)
        if ids[: len(before)] != before:  # a token lies across the boundary
            return encode(text)
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

            self._controlled = called(self.name, Backend.from_str, self.json)
            self._controlled.encode_special_tokens = False
        encoding = called(self.name, self._controlled.encode, text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Iterable[int]) -> str:
        return str(called(self.name, self.backend.decode, [int(i) for i in ids], skip_special_tokens=True))

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
            return [called(self.name, self.backend.decode, row, skip_special_tokens=True) for row in rows]
        return list(called(self.name, self.backend.decode_batch, rows, skip_special_tokens=True))

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


def _added_tokens(serialized: str) -> list[dict[str, Any]]:
    """`added_tokens` of a tokenizer.json that the library has read: without what comes after it, the whole vocabulary."""
    decoder, at = json.JSONDecoder(), serialized.index("{")
    while True:
        found = _MEMBER.match(serialized, at)
        if found is None:
            return []
        value, at = decoder.raw_decode(serialized, found.end())
        if json.loads(found[1]) == "added_tokens":
            return list(value)


def _marked(serialized: str) -> str | None:
    """The token that a tokenizer.json of ours marks as the end of document."""
    if f'"{END_MARK}"' not in serialized:
        return None
    added = _added_tokens(serialized)
    return next((token["content"] for token in added if token.get(END_MARK) is True), None)


def _whole(name: str, backend: Any, serialized: str) -> Any:
    """`backend` with every added token at the id that `serialized` gives it: the library renumbers those after a gap.

    Raises StoreError where a token cannot have its id.
    """
    from tokenizers import Tokenizer as Backend

    def moved(loaded: Any) -> list[dict[str, Any]]:
        return [token for token in added if loaded.token_to_id(token["content"]) != token["id"]]

    added = _added_tokens(serialized)
    wrong = moved(backend)
    values = json.loads(serialized) if wrong else {"model": {}}
    vocab = values["model"].get("vocab")
    if wrong and isinstance(vocab, dict):  # of the model's own entries ids may have gaps
        values["model"]["vocab"] = {**{token["content"]: token["id"] for token in added}, **vocab}
        backend = called(name, Backend.from_str, json.dumps(values))
        wrong = moved(backend)
    if wrong:
        token = wrong[0]
        why = f"the library gives it {backend.token_to_id(token['content'])}"
        raise StoreError(
            f"{name} adds {token['content']!r} as {token['id']}", why, "give added tokens the next free ids"
        )
    return backend


def auto_vocab_size(num_bytes: int) -> int:
    """Entries for a corpus of `num_bytes`: 8k under 10 MB, 16k under 100 MB, else 32k."""
    return 8192 if num_bytes < 10_000_000 else 16384 if num_bytes < 100_000_000 else 32768
