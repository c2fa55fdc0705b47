"""Small tokenizers of the kinds that other projects' models have."""

from collections.abc import Callable
from typing import Any

from retro_engine.data.tokenizer import Tokenizer

TEXTS = ["The castle was built in 1302 by Adelheid, near the river.", "user assistant system", "A café, naïve."] * 20
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chatml() -> Tokenizer:
    """Byte-level BPE with ChatML's control tokens: ids 1 and 2; 0 ends a document."""
    return Tokenizer(_byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]).to_str())


def byte_level() -> Tokenizer:
    return Tokenizer(_byte_level(["<|endoftext|>"]).to_str())


def roberta() -> Tokenizer:
    """A space before the first word, as if there were one."""
    return Tokenizer(_byte_level(["<s>", "<pad>", "</s>"], add_prefix_space=True).to_str())


def _byte_level(special: list[str], add_prefix_space: bool = False) -> Any:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def llama2() -> Tokenizer:
    """SentencePiece's BPE: a space before the first word that decoding strips, bytes for what is not known."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{i:02X}>": 3 + i for i in range(256)}
    words = ["\u2581The", "\u2581castle", "\u2581was", "\u2581built", "\u2581in", "\u2581by", "\u2581near"]
    merges = []
    for word in words:  # letter by letter, each beginning of a word is a token
        for end in range(1, len(word) + 1):
            for part in (word[end - 1], word[:end]):
                vocab.setdefault(part, len(vocab))
            if end > 1:
                merges.append((word[: end - 1], word[end - 1]))
    model = models.BPE(
        vocab=vocab, merges=list(dict.fromkeys(merges)), unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend.to_str())


def t5() -> Tokenizer:
    """SentencePiece's Unigram with Metaspace."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return Tokenizer(backend.to_str())


def bert() -> Tokenizer:
    """WordPiece: a space before every word but the first."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return Tokenizer(backend.to_str())


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level, "roberta": roberta, "llama2": llama2, "t5": t5, "bert": bert,
}  # fmt: skip
