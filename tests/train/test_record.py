"""A run's folder is read back as it was written, or it is said."""

import json
import os
from pathlib import Path

import pytest

from retro_engine.config import Config, load_config, to_yaml
from retro_engine.errors import MissingInputError, StoreError
from retro_engine.train import record


def flipped(path: Path, before: bytes, after: bytes) -> None:
    raw = path.read_bytes()
    assert before in raw
    path.unlink()
    path.write_bytes(raw.replace(before, after, 1))


def test_a_flipped_digit_in_the_settings_is_found(tmp_path: Path) -> None:
    said: list[str] = []
    record.write_settings(tmp_path, Config())
    path = tmp_path / record.SETTINGS_FILE
    record.check_settings(path, said.append)
    assert load_config(file=str(path)) == Config()
    flipped(path, b"98,2,0", b"90,2,0")
    with pytest.raises(StoreError, match="damaged or was edited"):
        record.check_settings(path, said.append)
    assert said == []


def test_every_byte_of_the_settings_counts(tmp_path: Path) -> None:
    """A change is refused, or it is in the mark and said; never another setting without a word."""
    record.write_settings(tmp_path, Config())
    path = tmp_path / record.SETTINGS_FILE
    raw = path.read_bytes()
    path.unlink()
    start = raw.index(b"\n")
    for place in range(0, len(raw), 7):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        said: list[str] = []
        try:
            record.check_settings(path, said.append)
        except StoreError:
            continue
        assert said, place
        assert place <= start, place


def test_settings_of_earlier_versions_are_read_with_a_note(tmp_path: Path) -> None:
    path = tmp_path / record.SETTINGS_FILE
    path.write_text(to_yaml(Config()))
    said: list[str] = []
    record.check_settings(path, said.append)
    assert len(said) == 1
    assert "has no checksum" in said[0]


def test_earlier_commands_and_another_number_of_threads_stay_known(tmp_path: Path) -> None:
    said: list[str] = []
    for step in range(record.MOST_EARLIER + 3):
        facts = {"command": ["retro", str(step)], "step": step, "threads": 2 if step < 2 else 1, "seed": 1}
        record.write_facts(tmp_path, facts, said.append)
    found = record.read_facts(tmp_path)
    assert [each["step"] for each in found["earlier"]] == list(range(2, step)) and len(found["earlier"]) == 20
    assert found["earlier"][0] == {"command": ["retro", "2"], "step": 2, "threads": 1}
    assert said == [
        "1 threads from here on; before it was 2: losses are not, to the last bit, those of a run that was never stopped"
    ]


def test_facts(tmp_path: Path) -> None:
    said: list[str] = []
    record.write_facts(tmp_path, {"seed": 1234, "fingerprints": {"store": "ab"}})
    assert record.read_facts(tmp_path, said.append) == {"seed": 1234, "fingerprints": {"store": "ab"}}
    path = tmp_path / record.FACTS_FILE
    flipped(path, b"1234", b"1235")
    with pytest.raises(StoreError, match="checksum"):
        record.read_facts(tmp_path, said.append)
    assert said == []
    path.write_text('{"seed": 1}')
    assert record.read_facts(tmp_path, said.append) == {"seed": 1}
    assert len(said) == 1
    path.write_text("[" * 100_000)
    with pytest.raises(StoreError, match="damaged"):
        record.read_facts(tmp_path)
    path.unlink()
    with pytest.raises(MissingInputError, match="does not exist"):
        record.read_facts(tmp_path)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    for name in (record.FACTS_FILE, record.METRICS_FILE):
        os.mkfifo(tmp_path / name)
    with pytest.raises(StoreError, match="is a pipe"):
        record.read_facts(tmp_path)
    with pytest.raises(StoreError, match="is a pipe"):
        list(record.checked_lines(tmp_path / record.METRICS_FILE))
    (tmp_path / record.METRICS_FILE).unlink()
    with open(tmp_path / record.METRICS_FILE, "wb") as file:
        file.truncate(record.MOST_LINES_BYTES + 1)
    with pytest.raises(StoreError, match="at most"):
        list(record.checked_lines(tmp_path / record.METRICS_FILE))


def test_a_damaged_line_is_named_and_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": step / 7, "note": 'a "crc32"'} for step in range(1, 6)]
    old = json.dumps({"step": 0, "loss": 9.5}) + "\n"
    path.write_text(old + "".join(map(record.checked_line, rows)) + '{"step": 6, "lo')
    said: list[str] = []
    assert [row for _, row in record.checked_lines(path, said.append)] == [{"step": 0, "loss": 9.5}, *rows]
    assert said == []
    flipped(path, b'"step": 3, "loss": 0.4', b'"step": 3, "loss": 0.1')
    flipped(path, b'"step": 5', b'"step\xff: 5')
    found = [row["step"] for _, row in record.checked_lines(path, said.append)]
    assert found == [0, 1, 2, 4]
    assert "in line 4, 6" in said[0]
