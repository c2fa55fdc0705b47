"""Token ids to text, one after another: what each adds to the text before it, in whole characters.

The text of a continuation is the text of prompt and continuation less that of the prompt. Tokenizers like SentencePiece's
drop the space of what comes first, so no token is decoded without one before it; half a character is held back.
"""

from collections.abc import Sequence

from retro_engine.data.tokenizer import Tokenizer, common

HALF = "\ufffd"  # what a tokenizer makes of half a character


class Detokenizer:
    """The text after `prompt`; `length` characters of it are whole so far."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._tokens = list(prompt)  # that are decoded together: the last that were, and those after them
        self._known = len(prompt)  # of these, tokens whose text is known
        self.length = 0

    def push(self, tokens: Sequence[int], is_last: bool = False) -> str:
        """The whole characters that came with `tokens`; with `is_last` the rest as well, half a character as U+FFFD."""
        self._tokens += tokens
        before = self._tokenizer.decode(self._tokens[: self._known])
        text = self._tokenizer.decode(self._tokens)
        if text.endswith(HALF) and not is_last:
            return ""
        new = text[len(before) :]
        if not text.startswith(before):
            is_cut = before.endswith(HALF)  # within a character, which is whole now; else bytes that make none with it
            new = text[common(before, text) :] if is_cut else self._tokenizer.within(self._tokens[self._known :])
        if new:
            self._tokens, self._known = self._tokens[self._known :], len(self._tokens) - self._known
        self.length += len(new)
        return new
