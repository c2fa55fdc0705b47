"""The tutorials' blocks that are marked `<!-- run -->` run as they stand, with few steps, in a campaign: minutes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from shell_blocks import ROOT, Block, blocks

PAGES = sorted((ROOT / "docs").glob("tutorial-*.md"))
RUN = [[block for block in blocks(page) if block.marker == "run"] for page in PAGES]


def test_there_is_something_to_run() -> None:
    assert len(PAGES) == 3 and sum(map(len, RUN)) >= 4


@pytest.mark.skipif(not os.environ.get("RETRO_CAMPAIGN"), reason="minutes: in a campaign")
@pytest.mark.parametrize("found", [found for found in RUN if found], ids=lambda found: found[0].page.stem)
def test_a_tutorial_runs_in_bash(found: list[Block], tmp_path: Path) -> None:
    """In a folder that has what a checkout has; the last value of a setting counts."""
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    begin = f"retro() {{ '{sys.executable}' -m retro_engine.cli \"$@\"; }}\npython() {{ '{sys.executable}' \"$@\"; }}\n"
    text = "\n".join(block.text for block in found).replace("retro eval", "retro eval --limit 2")
    script = begin + text.replace("trainer.max_steps=300", "trainer.max_steps=6 trainer.limit_val_batches=1")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(["bash", "-euc", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
