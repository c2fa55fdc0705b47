"""Kernels for retrieval-enhanced and plain transformers, usable alone: they need torch and nothing of retro_engine.

All public names are here; each op is also in the module of its name (`from retro_kernels.rope import rope`). The modules lie one
folder up in a checkout (a package `kernels` there would shadow PyPI's), and beside this file in an installation.
"""

from pathlib import Path

_here = Path(__file__).parent
if not (_here / "rope.py").exists():
    __path__.append(str(_here.parent))

from retro_kernels.attention import attention  # noqa: E402
from retro_kernels.backend import backend  # noqa: E402
from retro_kernels.chunked_cross_attention import chunked_cross_attention  # noqa: E402
from retro_kernels.cross_entropy import cross_entropy_  # noqa: E402
from retro_kernels.gather_neighbors import gather_neighbors  # noqa: E402
from retro_kernels.linear import linear, linear_in_blocks  # noqa: E402
from retro_kernels.norm import rms_norm  # noqa: E402
from retro_kernels.products import product  # noqa: E402
from retro_kernels.quantize import quantize  # noqa: E402
from retro_kernels.rope import rope, rope_qk  # noqa: E402
from retro_kernels.step import (  # noqa: E402
    Attending,
    CrossAttentionPart,
    FeedForwardPart,
    Matrix,
    Norm,
    SelfAttentionPart,
    Steps,
)
from retro_kernels.swiglu import swiglu  # noqa: E402

__version__ = "0.1.0"  # retro_engine's, with which it is installed
__all__ = [
    "Attending",
    "CrossAttentionPart",
    "FeedForwardPart",
    "Matrix",
    "Norm",
    "SelfAttentionPart",
    "Steps",
    "__version__",
    "attention",
    "backend",
    "chunked_cross_attention",
    "cross_entropy_",
    "gather_neighbors",
    "linear",
    "linear_in_blocks",
    "product",
    "quantize",
    "rms_norm",
    "rope",
    "rope_qk",
    "swiglu",
]
