"""SIGTERM and SIGINT save a checkpoint, in a validation too, and the run goes on from it."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forks import Fork
from training_helpers import config, losses, settings

from retro_engine.data.store import Store
from retro_engine.progress import Reporter
from retro_engine.train import checkpoint
from retro_engine.train.__main__ import main
from retro_engine.train.loop import train


@pytest.mark.parametrize(
    ("number", "code", "validation"),
    [
        (signal.SIGTERM, 143, ["trainer.val_check_interval=2", "trainer.limit_val_batches=null"]),  # in its midst
        (signal.SIGINT, 130, ["trainer.val_check_interval=100000"]),
    ],
)
def test_signals_save_and_the_run_goes_on(
    small_store: Store, tmp_path: Path, number: signal.Signals, code: int, validation: list[str]
) -> None:
    out = tmp_path / "run"
    words = settings(small_store, out, "trainer.max_steps=100000", *validation)
    with Fork(main, words, out=tmp_path / "out", errors=tmp_path / "errors") as process:
        deadline = time.monotonic() + 60
        while not (out / "metrics.jsonl").exists() or '"step": 2' not in (out / "metrics.jsonl").read_text():
            assert time.monotonic() < deadline
            assert process.is_running(), (tmp_path / "errors").read_text()
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(30) == code
    told, said = ((tmp_path / name).read_text() for name in ("out", "errors"))
    assert re.search(r"next:\n  the same command, which goes on from step \d+\n  retro eval", told)
    step = json.loads((checkpoint.find_checkpoint(out) / "trainer.json").read_text())["step"]
    assert step >= 2
    assert said.index("stopping after this step") < said.index(
        f"at step {step}, checkpoint saved: the same command goes on"
    )
    result = train(config(small_store, out, f"trainer.max_steps={step + 2}"), Reporter("quiet"))
    assert result.step == step + 2
    assert sorted(losses(out)) == list(range(1, step + 3))


def test_one_of_several_processes_leaves_while_its_groups_are_busy(tmp_path: Path) -> None:
    """Teardown would abort here (SIGABRT, -6)."""
    script = Path(__file__).parent / "leave_while_busy.py"
    words = [sys.executable, str(script), str(tmp_path / "store")]
    both = [subprocess.Popen([*words, rank], stdout=subprocess.PIPE, text=True) for rank in "01"]
    for process in both:
        said, _ = process.communicate(timeout=60)
        assert (process.returncode, said) == (3, "left, done at the end\n")
