"""What lies beside a tokenizer.json: chat templates, special tokens by name, and the ids that end a text.

Reads Hugging Face's files, a checkpoint of ours has two of them: tokenizer_config.json (`chat_template`: a text, or a
list of named ones; `bos_token` and the like: a text or an object with `content`), special_tokens_map.json,
chat_template.jinja, additional_chat_templates/NAME.jinja, chat_template.json, and of generation_config.json and
config.json `eos_token_id`: an id or a list.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retro_engine.data.inputs import shown
from retro_engine.data.tokenizer_files import read_object
from retro_engine.errors import StoreError, read_error

CONFIG_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_JSON = "chat_template.json"
TEMPLATE_FOLDERS = ("additional_chat_templates", "chat_templates")
ID_FILES = ("generation_config.json", "config.json")
DEFAULT = "default"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MAX_TEMPLATE = 1 << 20  # characters of a template


@dataclass(frozen=True)
class ChatFiles:
    """`templates` by name; `tokens`: bos_token and the like; `end_ids`: any of them ends a text."""

    templates: Mapping[str, str] = field(default_factory=dict)
    tokens: Mapping[str, str] = field(default_factory=dict)
    end_ids: tuple[int, ...] = ()

    def tokenizer_config(self) -> dict[str, Any]:
        """What tokenizer_config.json says of templates and tokens; empty where there are none."""
        values: dict[str, Any] = dict(self.tokens)
        if list(self.templates) == [DEFAULT]:
            values["chat_template"] = self.templates[DEFAULT]
        elif self.templates:
            values["chat_template"] = [{"name": name, "template": text} for name, text in self.templates.items()]
        return values


def read_chat_files(folder: Path) -> ChatFiles:
    """Those of a folder, as transformers reads them: files of their own win over tokenizer_config.json.

    Raises StoreError for a file that is damaged or a value that is of no known form.
    """
    config = _read(folder / CONFIG_FILE)
    tokens = {**named_tokens(_read(folder / SPECIAL_FILE), SPECIAL_FILE), **named_tokens(config, CONFIG_FILE)}
    templates = named_templates(_read(folder / TEMPLATE_JSON).get("chat_template"), f"{folder / TEMPLATE_JSON}")
    templates = named_templates(config.get("chat_template"), f"{folder / CONFIG_FILE}") | templates | _loose(folder)
    ids = dict.fromkeys(i for name in ID_FILES for i in _ids(folder / name))
    return ChatFiles(templates, tokens, tuple(ids))


def said_end(folder: Path) -> tuple[str | int, str] | None:
    """The token, or its id, that the files of a folder say ends a text, and which file; None where none says so.

    Raises StoreError for a file that is no JSON, or says it in no known form.
    """
    for path in (folder / CONFIG_FILE, folder / SPECIAL_FILE):
        token = named_tokens(_read(path), shown(path)).get("eos_token")
        if token is not None:
            return token, shown(path)
    for path in (folder / name for name in ID_FILES):
        for index in _ids(path):
            return index, shown(path)
    return None


def _ids(path: Path) -> list[int]:
    """What a file says of `eos_token_id`, and of that of the text's part where a model reads more than text."""
    values = _read(path)
    nested = values.get("text_config")
    parts = (values, nested if isinstance(nested, dict) else {})
    return [i for part in parts for i in end_ids(part.get("eos_token_id"), shown(path))]


def named_templates(value: Any, name: str) -> dict[str, str]:
    """Templates by name, of a text, a list of {name, template}, an object, or None. Raises StoreError."""
    if value is None:
        return {}
    if isinstance(value, str):
        value = {DEFAULT: value}
    elif isinstance(value, list) and all(isinstance(one, dict) for one in value):
        value = {one.get("name"): one.get("template") for one in value}
    if not isinstance(value, dict) or not all(isinstance(part, str) for pair in value.items() for part in pair):
        raise StoreError(f"{name}: chat_template is of no known form", "a text, or a list of names and templates")
    for text in value.values():
        if len(text) > MAX_TEMPLATE:
            raise StoreError(f"{name}: a chat template of {len(text):,} characters", f"at most {MAX_TEMPLATE:,}")
    return value


def named_tokens(values: Mapping[str, Any], name: str) -> dict[str, str]:
    """bos_token and the like as texts. Raises StoreError for one of no known form."""
    found = {}
    for key in NAMES:
        value = values.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if text is not None and not isinstance(text, str):
            raise StoreError(f"{name}: {key} is of no known form", f"it is a {type(text).__name__}, not a text")
        if text:
            found[key] = text
    return found


def end_ids(value: Any, name: str) -> list[int]:
    """Ids of `eos_token_id`: one, a list, or None. Raises StoreError for anything else."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or not -1 <= i < 1 << 31 for i in ids):
        raise StoreError(f"{name}: eos_token_id={value!r:.80} cannot be read", "an id, or a list of ids")
    return [i for i in ids if i >= 0]  # -1: transformers' "none"


def _loose(folder: Path) -> dict[str, str]:
    """Templates in files of their own."""
    found = {}
    for place in TEMPLATE_FOLDERS:
        for path in sorted((folder / place).glob("*.jinja")):
            found[path.stem] = _text(path, MAX_TEMPLATE * 4)
    if (folder / TEMPLATE_FILE).is_file():
        found[DEFAULT] = _text(folder / TEMPLATE_FILE, MAX_TEMPLATE * 4)
    return named_templates(found, str(folder))


def _text(path: Path, most: int) -> str:
    try:
        if not path.is_file() or path.stat().st_size > most:
            raise StoreError(f"{path} is not read", f"a plain file of at most {most:,} bytes is expected")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise StoreError(f"{path} is not UTF-8", str(error)) from error
    except OSError as error:
        raise read_error(error, path) from error


def _read(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none."""
    return read_object(path) if path.exists() else {}
