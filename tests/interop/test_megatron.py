"""State dicts of other implementations that do not fit; tests/test_golden.py holds those that do to their logits."""

import pytest

from retro_engine.errors import StoreError, UsageError
from retro_engine.interop.megatron import import_state_dict


def test_foreign_state_dicts_that_do_not_fit() -> None:
    with pytest.raises(UsageError, match="one of mcore, megatron, nemo"):
        import_state_dict({}, {}, "hf")
    for source, key in (("mcore", "L"), ("nemo", "heads")):
        with pytest.raises(StoreError, match=f"{key} is missing"):
            import_state_dict({}, {}, source)
