"""`retro serve` as a process: its first start, its signals, its refusals (kill -9: tests/reliability)."""

import gc
import json
import signal
import weakref
from pathlib import Path

import pytest
from serve_helpers import PASSWORD, client_of, started

from retro_engine.data.store import Store
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import MissingInputError, StoreError, UsageError
from retro_engine.generate.request import Request
from retro_engine.library.library import Library
from retro_engine.model.linear import Int8Linear
from retro_engine.progress import Reporter
from retro_engine.serve.accounts import Accounts
from retro_engine.serve.service import ServiceOptions, open_service
from retro_engine.serve.start import Address, serve_until_signal, settle
from retro_engine.train.checkpoint import find_checkpoint


def test_the_first_start_and_the_signals(small_run: Path, tmp_path: Path) -> None:
    with started(small_run, tmp_path) as server, client_of(server) as client:
        assert server.url.startswith("http://127.0.0.1:")
        assert len(server.setup) >= 43
        assert client.get("/v1/models").status_code == 401
        body = {"name": "ada", "password": PASSWORD, "setup": server.setup}
        assert client.post("/auth/login", json=body).status_code == 200
        assert client.get("/v1/models").status_code == 200
        client.post("/v1/documents", json={"id": "kept", "text": "amber"}).raise_for_status()
        code, rest = server.end(signal.SIGTERM)
        assert code in (-signal.SIGTERM, 143)
        assert "Traceback" not in rest
    with started(small_run, tmp_path) as server, client_of(server) as client:
        assert server.setup == ""
        assert client.post("/auth/login", json=body).status_code == 401
        del body["setup"]
        assert client.post("/auth/login", json=body).status_code == 200
        assert client.get("/v1/documents/kept").json()["text"] == "amber"
        code, rest = server.end(signal.SIGINT)
        assert code == 130
        assert "Traceback" not in rest
    log = [json.loads(line)["action"] for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert log == ["sign-in", "documents.add", "sign-in"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_an_address_that_others_reach_needs_users_or_keys(small_run: Path, tmp_path: Path, host: str) -> None:
    accounts = Accounts(tmp_path / "accounts.sqlite")
    with pytest.raises(UsageError, match="no users and no keys"):
        serve_until_signal(ServiceOptions(run=str(small_run)), Address(host=host, port=0), accounts, Reporter("quiet"))


def test_what_cannot_be_opened_ends_the_start(small_run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for options, kind in (
        (ServiceOptions(run=str(tmp_path / "nothing")), MissingInputError),
        (ServiceOptions(run=str(small_run), library=str(tmp_path / "file")), UsageError),
        (ServiceOptions(run=str(small_run), library=str(tmp_path / "l"), stores=[str(tmp_path)]), MissingInputError),
        (ServiceOptions(run=str(small_run), library=str(tmp_path / "l"), mode="psychic"), UsageError),
        (ServiceOptions(run=str(small_run), library=str(tmp_path / "l"), dtype="fp8"), UsageError),
    ):
        with pytest.raises(kind):
            serve_until_signal(options, Address(port=0), Accounts(tmp_path / "accounts.sqlite"), Reporter("quiet"))


def test_a_library_in_use_is_refused(small_run: Path, small_store: Store, tmp_path: Path) -> None:
    Library.create(tmp_path / "library", small_store.tokenizer, 16)
    options = ServiceOptions(run=str(small_run), library=str(tmp_path / "library"))
    with Library(tmp_path / "library"), pytest.raises(UsageError, match="is in use"):
        serve_until_signal(options, Address(port=0), Accounts(tmp_path / "accounts.sqlite"), Reporter("quiet"))


def test_a_library_of_another_tokenizer_or_chunk_size_is_refused(small_run: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(find_checkpoint(small_run))
    for name, given, what in (("a", Tokenizer.train(["other text"], 260), "tokenizer"), ("b", tokenizer, "chunk_size")):
        Library.create(tmp_path / name, given, 32)
        options = ServiceOptions(run=str(small_run), library=str(tmp_path / name))
        with pytest.raises(StoreError, match=f"the model has {what} .*\n.*{tmp_path / name} has"):
            serve_until_signal(options, Address(port=0), Accounts(tmp_path / "accounts.sqlite"), Reporter("quiet"))
        with Library(tmp_path / name):  # it was closed again
            pass


def test_what_is_there_when_it_is_ready_is_not_looked_through_again() -> None:
    """The garbage collector's; what comes later is collected as ever."""
    before = gc.get_freeze_count()
    settle()
    try:
        assert gc.get_freeze_count() > before + 10_000
        later = [weakref.ref(one := type("Later", (), {})())]
        one.itself = one  # type: ignore[attr-defined]
        del one
        gc.collect()
        assert later[0]() is None
    finally:
        gc.unfreeze()
        gc.freeze()  # as conftest.py leaves it


def test_weights_of_a_byte(small_run: Path, tmp_path: Path) -> None:
    service = open_service(ServiceOptions(run=str(small_run), library=str(tmp_path / "library"), dtype="int8"))
    try:
        assert isinstance(service.generator.model.head, Int8Linear)
        assert len(service.engine.submit(Request("The neighbor", 4)).result().tokens) == 4
    finally:
        service.close()
