"""`retro train`: the same flags and settings as `torchrun -m retro_engine.train`."""

from retro_engine.cli import flags
from retro_engine.train.__main__ import add_arguments, run


def add(commands: flags.Commands) -> None:
    about = "train a model; also torchrun -m retro_engine.train"
    sub = commands.add_parser("train", help=about, description=about)
    sub.set_defaults(run=run, reads=flags.EVERY_SETTING)
    add_arguments(sub)
