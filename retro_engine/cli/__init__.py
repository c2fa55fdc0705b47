"""The command `retro`, a file a command: its flags in `add(commands)`, what it does in `run(args)`, side by side."""

from retro_engine.cli.main import command, main

__all__ = ["command", "main"]
