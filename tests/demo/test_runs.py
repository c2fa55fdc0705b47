"""What both demos refuse before they make anything."""

from pathlib import Path

import pytest

from retro_engine.demo.runs import refuse_held, refuse_own
from retro_engine.errors import UsageError


def test_a_demo_is_not_overwritten(tmp_path: Path) -> None:
    refuse_held(tmp_path, "store")
    (tmp_path / "store").mkdir()
    with pytest.raises(UsageError, match="holds a demo"):
        refuse_held(tmp_path, "store")


@pytest.mark.parametrize("override", ["seed=1", "++seed=1"])
def test_its_own_settings_are_refused_however_they_are_written(override: str) -> None:
    refuse_own(["trainer.precision=32"], {"seed": "--seed says it"}, "why")
    with pytest.raises(UsageError, match="seed is the demo's own"):
        refuse_own([override], {"seed": "--seed says it"}, "why")
