"""What an answer must match: JSON, a JSON schema, a regular expression, one of several texts, a grammar (extra `grammar`).

llguidance says before each token which ones may come; the others' logits become minus infinity before a token is chosen, so
every way of sampling and drafting works as without. It knows the tokenizer by the bytes of its tokens alone.
"""

import json
import re
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from retro_engine.data.token_bytes import TokenBytes
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import MissingExtraError, UsageError

Kind = Literal["json_schema", "regex", "choice", "grammar"]
ANY_JSON = '{"type": "object"}'
# A small model that may write spaces for ever does. Indented objects 16 deep have room.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,33}"
META = re.compile(r"[\\.+*?()|\[\]{}^$]")
TIMES, NO_LEAP = ("date-time", "time"), "^[^:]+:[^:]+:[0-5]"
DATA = ("const", "enum", "default", "examples")  # of a schema: what holds no schemas
BEFORE = "\n"  # no word goes on after it
MAX_COMPILED = 64  # grammars that are kept
UNFINISHED = "the answer was cut off by max_tokens before it was all that its grammar asks for"


@dataclass(frozen=True)
class Grammar:
    """`text`: of a schema or of choices (a list) as JSON; of a grammar in Lark's or llama.cpp's (GBNF) form."""

    kind: Kind
    text: str


class Matcher:
    """Where one answer is in its grammar."""

    def __init__(self, state: Any):
        self._state = state

    def allowed(self, logits_V: Tensor, given_V: Tensor) -> Tensor:
        """The logits without tokens that cannot come; where no other is left, of `given_V`, which no bias and no least
        length has touched. Raises UsageError where the grammar is too hard to follow.
        """
        bits = np.frombuffer(self._state.compute_bitmask(), np.uint8)
        self._check()
        is_allowed = np.unpackbits(bits, bitorder="little", count=logits_V.shape[-1]).astype(bool)
        is_out = ~torch.from_numpy(is_allowed).to(logits_V.device)
        cut = logits_V.masked_fill(is_out, -torch.inf)
        return cut if bool(torch.isfinite(cut).any()) else given_V.masked_fill(is_out, -torch.inf)

    def accept(self, token: int) -> None:
        """Go on behind a token that was allowed."""
        self._state.consume_token(token)
        self._check()

    @property
    def is_over(self) -> bool:
        """Whether nothing more can come."""
        return bool(self._state.is_stopped())

    @property
    def is_complete(self) -> bool:
        """Whether the text so far is all that is asked for."""
        return bool(self._state.is_accepting())

    def _check(self) -> None:
        if self._state.is_error():
            raise UsageError("the grammar cannot be followed", _first_line(self._state.get_error()), "make it simpler")


class Grammars:
    """The grammars of one tokenizer; those used last are kept compiled."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._lock = threading.Lock()
        self._known: Any = None  # llguidance's tokenizer
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()

    def matcher(self, grammar: Grammar) -> Matcher:
        """Raises MissingExtraError without llguidance, UsageError for a grammar that is none or that matches nothing."""
        with self._lock:
            state = self._compiled.get(grammar)
            if state is None:
                state = self._compile(grammar)
                self._compiled[grammar] = state
            self._compiled.move_to_end(grammar)
            while len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
            return Matcher(state.deep_copy())

    def _compile(self, grammar: Grammar) -> Any:
        guidance = _llguidance()
        if self._known is None:
            self._known = _tokenizer(guidance, self.tokenizer)
        try:
            state = guidance.LLMatcher(self._known, _source(guidance, grammar), log_level=0)
        except ValueError as error:
            raise UsageError("the grammar cannot be read", _first_line(str(error))) from None
        if state.is_error():
            raise UsageError("the grammar cannot be read", _first_line(state.get_error()))
        tried = state.deep_copy()
        tried.compute_bitmask()
        if tried.is_error() or (tried.is_stopped() and not tried.is_accepting()):
            why = _first_line(tried.get_error()) or "no text matches it"
            raise UsageError("the grammar matches nothing", why)
        return state


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        what = "llguidance is not installed"
        raise MissingExtraError(what, "grammars and schemas need it", "pip install 'retro-engine[grammar]'") from error
    return llguidance


def _source(guidance: Any, grammar: Grammar) -> str:
    """In llguidance's own form. Raises ValueError for what it cannot read."""
    if grammar.kind == "json_schema":
        options = {"whitespace_pattern": WHITESPACE}
        return str(guidance.LLMatcher.grammar_from_json_schema(grammar.text, overrides=options))
    if grammar.kind == "choice":  # as rules, thousands of texts take minutes
        texts = (META.sub(r"\\\g<0>", text) for text in json.loads(grammar.text))
        return str(guidance.grammar_from("regex", "|".join(texts)))
    return str(guidance.grammar_from(grammar.kind, grammar.text))


def _tokenizer(guidance: Any, tokenizer: Tokenizer) -> Any:
    """llguidance's tokenizer: the bytes of every token, and which of them end a text."""
    wrapped = guidance.TokenizerWrapper(_Tokens(tokenizer))
    return guidance.LLTokenizer(wrapped, n_vocab=tokenizer.vocab_size, eos_token=tokenizer.end_ids)


class _Tokens:
    """A tokenizer under the names that llguidance reads."""

    def __init__(self, tokenizer: Tokenizer):
        size, known = tokenizer.vocab_size, TokenBytes(tokenizer)
        self.tokens = [known.of(index, text) for index, text in enumerate(tokenizer.pieces(range(size)))]
        self.special_token_ids = sorted(tokenizer.special_ids)
        self.eos_token_id, self.bos_token_id = tokenizer.eod_id, tokenizer.bos_id
        self._encode_after = tokenizer.encode_after

    def __call__(self, text: str) -> list[int]:
        """Of a text within a text: some tokenizers put a space before what begins one."""
        return self._encode_after(BEFORE, text)[0]


def schema(value: Any) -> Grammar:
    """Of a JSON schema. A time ends in no leap second, which llguidance puts anywhere and validators take at midnight alone."""
    return Grammar("json_schema", json.dumps(_without_leap_seconds(value)))


def _without_leap_seconds(value: Any) -> Any:
    """A schema whose times have a pattern, unless they have one of their own."""
    if isinstance(value, list):
        return [_without_leap_seconds(one) for one in value]
    if not isinstance(value, dict):
        return value
    more = {name: part if name in DATA else _without_leap_seconds(part) for name, part in value.items()}
    return {"pattern": NO_LEAP, **more} if value.get("format") in TIMES else more


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:300]
