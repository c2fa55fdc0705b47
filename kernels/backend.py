"""The only place that chooses an implementation of an op. Reads the environment variable RETRO_BACKEND.

`reference` (plain PyTorch, any device) is the one backend of this version; forcing another raises.
"""

import os

BACKENDS = ("reference",)


def backend() -> str:
    """The backend in use. Raises ValueError when RETRO_BACKEND names one that is not available."""
    forced = os.environ.get("RETRO_BACKEND", "")
    if forced and forced not in BACKENDS:
        raise ValueError(
            f"RETRO_BACKEND={forced} is not available\n  this version has {', '.join(BACKENDS)}\n  unset RETRO_BACKEND"
        )
    return forced or "reference"
