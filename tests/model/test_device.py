"""One function decides where a model is; every command that runs one asks it and says what it said."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from retro_kernels import cpp
from training_helpers import config

from retro_engine.api import Retro
from retro_engine.cli import main
from retro_engine.data.store import Store
from retro_engine.errors import OutOfResourceError, RetroError, UsageError
from retro_engine.generate import open_model
from retro_engine.model import device
from retro_engine.model.device import describe_device, num_processes, pick_device
from retro_engine.progress import Reporter
from retro_engine.train.__main__ import DEVICES
from retro_engine.train.loop import train


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, as far as anybody asks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda place: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: "Fake 9000")


@pytest.fixture
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("gpus")
def test_a_gpu_is_taken_where_there_is_one() -> None:
    assert pick_device() == pick_device("auto") == pick_device("gpu") == pick_device("cuda") == torch.device("cuda", 0)
    assert pick_device("auto", 1) == torch.device("cuda", 1)
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(OutOfResourceError, match="process 2 of this node has no GPU"):
        pick_device("auto", 2)
    with pytest.raises(UsageError, match="did you mean gpu"):
        pick_device("gpuu")
    assert describe_device(pick_device()) == "on cuda:0, Fake 9000"
    assert describe_device(pick_device("cpu")) == "on the CPU, though there is a GPU"


@pytest.mark.usefixtures("no_gpus")
def test_without_a_gpu() -> None:
    assert pick_device() == torch.device("cpu")
    assert describe_device(pick_device()) == "on the CPU"
    with pytest.raises(OutOfResourceError, match="there is no GPU"):
        pick_device("gpu")
    assert num_processes("auto", None) is None
    assert num_processes("auto", 8) == 8
    with pytest.raises(UsageError, match="it means every GPU, and there is none"):
        num_processes("auto", -1)


@pytest.mark.usefixtures("gpus")
def test_processes_of_a_node() -> None:
    assert num_processes("gpu", -1) == 2
    assert num_processes("gpu", 2) == 2
    assert num_processes("cpu", 8) == 8
    with pytest.raises(OutOfResourceError, match="there are 2"):
        num_processes("auto", 8)


@pytest.fixture(scope="module")
def run(small_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    one_step = ["trainer.max_steps=1", "trainer.limit_val_batches=0", "exp_manager.create_tensorboard_logger=false"]
    train(config(small_store, out, *one_step), Reporter("quiet"))
    return out


class AskedError(RetroError):
    """Ends a command when its model has been moved."""

    exit_code = 77


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The devices that models were moved to; the command ends there, since nothing computes on `meta`."""
    seen: list[str] = []

    def fake(accelerator: str = "auto", local_rank: int = 0) -> torch.device:
        seen.append(accelerator)
        return torch.device("meta")

    def stop(place: torch.device) -> str:
        assert place.type == "meta", "the model is not where it was asked to be"
        raise AskedError(f"asked for {seen[-1]}")

    monkeypatch.setattr(open_model, "pick_device", fake)
    for module in (
        "retro_engine.report",
        "retro_engine.model.device",
    ):  # the first keeps the function it was loaded with
        monkeypatch.setattr(f"{module}.describe_device", stop)
    return seen


COMMANDS = {
    "eval": ["eval", "RUN"],
    "questions": ["eval", "RUN", "--questions", "FILE"],
    "lm-eval": ["eval", "RUN", "--lm-eval", "task"],
    "generate": ["generate", "RUN", "river"],
    "explain": ["explain", "RUN", "river", "stone"],
    "report": ["report", "RUN"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_moves_the_model_and_says_where(run: Path, tmp_path: Path, moved: list[str], name: str) -> None:
    if name == "lm-eval":
        pytest.importorskip("lm_eval")
    (tmp_path / "q.jsonl").write_text('{"question": "Which river?", "answers": ["amber"], "neighbors": ["stone"]}\n')
    names = {"RUN": str(run), "FILE": str(tmp_path / "q.jsonl")}
    command = [names.get(word, word) for word in COMMANDS[name]]
    for asked, expected in (
        ([], "auto"),
        (["--device", "gpu"], "gpu"),
        (["trainer.accelerator=gpu"], "gpu"),
        (["--device", "cpu"], "cpu"),
    ):
        assert main([*command, *asked]) == 77, asked
        assert moved[-1] == expected


def test_serving_moves_the_model(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from retro_engine.serve.service import ServiceOptions, open_service

    def fake(accelerator: str = "auto", local_rank: int = 0) -> torch.device:
        raise AskedError(f"asked for {accelerator}")

    monkeypatch.setattr(open_model, "pick_device", fake)
    with pytest.raises(AskedError, match="asked for gpu"):
        open_service(ServiceOptions(run=str(run), library=str(tmp_path / "library"), device="gpu"))
    seen: list[Any] = []
    monkeypatch.setattr("retro_engine.serve.start.serve_until_signal", lambda options, *_: seen.append(options.device))
    accounts = ["--accounts", str(tmp_path / "accounts.sqlite")]
    for asked, expected in (([], "auto"), (["--device", "cpu"], "cpu"), (["trainer.accelerator=gpu"], "gpu")):
        assert main(["serve", str(run), *accounts, *asked]) == 0
        assert seen[-1] == expected
    monkeypatch.setenv("RETRO_SERVE_DEVICE", "gpu")
    assert main(["serve", str(run), *accounts]) == 0
    assert seen[-1] == "gpu"


def test_the_model_s_inputs_follow_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's way in takes torch's devices as well."""
    assert Retro.from_pretrained(run, device="cpu").device.type == "cpu"
    assert Retro.from_pretrained(run, device=torch.device("meta")).device.type == "meta"


@pytest.mark.parametrize(("command", "found"), [
    (["generate", "RUN", "river", "--device", "cpu", "trainer.accelerator=gpu"], "they say different things"),
    (["generate", "RUN", "river", "trainer.devices=8"], "generation runs in one process"),
    (["generate", "RUN", "river", "model.num_neighbors=3"], "the model has 2"),
    (["generate", "RUN", "river", "model.optim.lr=1"], "takes no such setting"),
    (["eval", "RUN", "model.optim.lr=1"], "takes no such setting"),
    (["eval", "RUN", "trainer.precision=bf16"], "takes no such setting"),
    (["report", "RUN", "model.data.splits_string=x"], "takes no such setting"),
    (["inspect", "RUN", "trainer.accelerator=gpu"], "takes no settings"),
])  # fmt: skip
def test_settings_that_a_command_does_not_read(
    run: Path, capsys: pytest.CaptureFixture[str], command: list[str], found: str
) -> None:
    assert main([str(run) if word == "RUN" else word for word in command]) == 2
    assert found in capsys.readouterr().err


@pytest.mark.usefixtures("no_gpus")
def test_it_is_said_on_standard_error(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(run), "river", "inference.tokens_to_generate=1"]) == 0
    said = capsys.readouterr()
    assert "on the CPU\n" in said.err
    assert "CPU" not in said.out
    assert main(["generate", str(run), "river", "--device", "gpu"]) == 5
    assert "there is no GPU" in capsys.readouterr().err
    assert device.ACCELERATORS == DEVICES == ("auto", "cpu", "gpu")


@pytest.mark.parametrize("name", ["RETRO_PRODUCTS", "RETRO_BACKEND", "RETRO_CPU"])
def test_kernels_that_the_environment_names_and_are_not_there_are_a_three_line_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Where it is decided on what a command runs, so in all that compute."""
    monkeypatch.setenv(name, "x")
    monkeypatch.setattr(
        cpp, "instruction_set", functools.cache(cpp.instruction_set.__wrapped__)
    )  # asked once a process
    with pytest.raises(UsageError, match=f"^{name}=x"):
        pick_device("cpu")
    assert main(["mup", "check"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {name}=x")
    assert main(["doctor"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {name}=x")
    assert error.endswith(f"\n  unset {name}\n")
    assert len(error.splitlines()) <= 3
