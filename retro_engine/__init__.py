"""retro-engine: text in, a retrieval-enhanced language model (RETRO) out.

`from retro_engine import Corpus, Index, Retro, ask, fit` is the Python interface; names load on first use, so
importing the package does no work.
"""

from typing import Any

from retro_engine.version import __version__ as __version__

__all__ = ["Corpus", "Index", "Retro", "ask", "fit"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from retro_engine import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
