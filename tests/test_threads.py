"""How long threads that wait keep their cores, and who decides it."""

import os
import sys
from types import ModuleType

import pytest

from retro_engine.cli import ask, generate, serve
from retro_engine.cli.main import main
from retro_engine.errors import UsageError
from retro_engine.threads import SPINS, VARIABLES, started_to_wait_shortly, wait_shortly


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # put back at the end
        monkeypatch.delenv(name)


@pytest.mark.parametrize("module", [ask, generate, serve])
def test_commands_that_decode_wait_shortly(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[ModuleType] = []

    def waits() -> None:
        called.append(module)
        raise UsageError("it is enough to know")

    monkeypatch.setattr(module, "wait_shortly", waits)
    words = {ask: ["nowhere", "Who?"], generate: ["nowhere", "Once"], serve: ["nowhere", "--port", "-1"]}[module]
    assert main([module.__name__.rpartition(".")[2], *words]) == 2
    assert called == [module]


def test_it_is_said_before_torch_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    wait_shortly()
    assert os.environ["GOMP_SPINCOUNT"] == SPINS


@pytest.mark.parametrize("name", VARIABLES)
def test_what_a_user_set_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setenv(name, "passive")
    wait_shortly()
    with started_to_wait_shortly():
        assert {n: os.environ[n] for n in VARIABLES if n in os.environ} == {name: "passive"}


def test_nothing_is_said_once_torch_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", sys)
    wait_shortly()
    assert "GOMP_SPINCOUNT" not in os.environ
    with started_to_wait_shortly():
        assert os.environ["GOMP_SPINCOUNT"] == SPINS
    assert "GOMP_SPINCOUNT" not in os.environ
