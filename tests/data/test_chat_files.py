"""What lies beside a tokenizer.json, in all of Hugging Face's forms; what is damaged is named."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizer_helpers import chatml

from retro_engine.data.chat_files import ChatFiles, read_chat_files
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import StoreError


def folder(path: Path, **files: Any) -> Path:
    """A folder of files; "__" in a name is a dot."""
    for name, content in files.items():
        place = path / name.replace("__", ".")
        place.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_the_places_of_a_template(tmp_path: Path) -> None:
    assert read_chat_files(tmp_path) == ChatFiles()
    folder(tmp_path, tokenizer_config__json={"chat_template": "one"})
    assert read_chat_files(tmp_path).templates == {"default": "one"}
    named = [{"name": "default", "template": "two"}, {"name": "tool_use", "template": "tools"}]
    folder(tmp_path, tokenizer_config__json={"chat_template": named})
    assert read_chat_files(tmp_path).templates == {"default": "two", "tool_use": "tools"}
    folder(tmp_path, chat_template__json={"chat_template": "three"})
    assert read_chat_files(tmp_path).templates == {"default": "three", "tool_use": "tools"}
    (tmp_path / "additional_chat_templates").mkdir()
    folder(tmp_path / "additional_chat_templates", rag__jinja="of documents")
    folder(tmp_path, chat_template__jinja="\ufefffour")
    assert read_chat_files(tmp_path).templates == {"default": "four", "tool_use": "tools", "rag": "of documents"}


def test_special_tokens_and_ends(tmp_path: Path) -> None:
    folder(
        tmp_path,
        tokenizer_config__json={"bos_token": None, "eos_token": {"content": "<|im_end|>", "lstrip": False}},
        special_tokens_map__json={"bos_token": "<s>", "eos_token": "</s>"},
        generation_config__json={"eos_token_id": [128001, 128009]},
        config__json={"eos_token_id": 7, "text_config": {"eos_token_id": 128001}},
    )
    found = read_chat_files(tmp_path)
    assert found.tokens == {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    assert found.end_ids == (128001, 128009, 7)
    folder(tmp_path, generation_config__json={"eos_token_id": -1}, config__json={})
    assert read_chat_files(tmp_path).end_ids == ()


def test_a_tokenizer_has_what_lies_beside_it(tmp_path: Path) -> None:
    folder(
        tmp_path,
        tokenizer__json=chatml().json,
        tokenizer_config__json={"eos_token": "<|im_end|>", "chat_template": "x"},
        generation_config__json={"eos_token_id": [5, 2]},
    )
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.end_ids == [5, 2, 0]
    assert tokenizer.chat_files.templates == {"default": "x"}
    alone = Tokenizer.load(tmp_path / "tokenizer.json")  # the file is named: what ends a document, and no more
    assert (alone.end_ids, alone.chat_files.templates) == ([2, 0], {})


@pytest.mark.parametrize("templates", [{"default": "a"}, {"default": "a", "rag": "b"}, {"rag": "b"}, {}])
def test_tokenizer_config_keeps_them(tmp_path: Path, templates: dict[str, str]) -> None:
    kept = ChatFiles(templates, {"eos_token": "<|im_end|>"})
    folder(tmp_path, tokenizer_config__json=kept.tokenizer_config())
    assert read_chat_files(tmp_path) == kept


@pytest.mark.parametrize(("files", "message"), [
    ({"tokenizer_config__json": "{"}, "is not JSON"),
    ({"tokenizer_config__json": "[1]"}, "holds no settings"),
    ({"tokenizer_config__json": "[" * 100_000}, "is not JSON"),
    ({"tokenizer_config__json": {"chat_template": 3}}, "no known form"),
    ({"tokenizer_config__json": {"chat_template": [{"name": "x"}]}}, "no known form"),
    ({"tokenizer_config__json": {"eos_token": ["a"]}}, "eos_token is of no known form"),
    ({"generation_config__json": {"eos_token_id": "2"}}, "eos_token_id='2' cannot be read"),
    ({"generation_config__json": {"eos_token_id": [True]}}, "cannot be read"),
    ({"config__json": {"eos_token_id": 1 << 40}}, "cannot be read"),
    ({"chat_template__jinja": "x" * (1 << 20) + "x"}, "1,048,577 characters"),
])  # fmt: skip
def test_what_is_damaged(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        read_chat_files(folder(tmp_path, **files))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(StoreError, match="is not UTF-8"):
        read_chat_files(tmp_path)
