"""`python -m retro_engine.cli` is the command `retro`."""

import sys

from retro_engine.cli.main import command

sys.exit(command())
