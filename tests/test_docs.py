"""The example of docs/kernels.md runs: every op in a plain PyTorch model that is not ours."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"


def test_the_example_of_the_page() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    for parameter in (names["embed"].weight, names["project"].weight):  # type: ignore[attr-defined]
        assert parameter.grad.abs().sum() > 0
    assert "retro_engine" not in code
