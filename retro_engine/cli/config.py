"""`retro config`: settings, shown and compared."""

import argparse
import json
from dataclasses import asdict

from retro_engine.cli import flags
from retro_engine.errors import UsageError, nearest


def add(commands: flags.Commands) -> None:
    about = "show the settings, list the keys, or compare two files"
    sub = flags.command(commands, "config", run, about, flags.EVERY_SETTING)
    sub.add_argument("what", choices=["show", "keys", "diff"])
    sub.add_argument("arguments", nargs="*", metavar="ARG", help="keys: a section; diff: two files; show: key=value")
    sub.add_argument("--preset")
    sub.add_argument("--config", "-c", metavar="FILE")


def run(args: argparse.Namespace) -> int:
    from retro_engine.config import Config, flat_keys, load_config, to_yaml

    if args.what == "show":
        print(to_yaml(load_config([*args.arguments, *args.overrides], args.preset, args.config)), end="")
    elif args.what == "keys":
        from retro_engine.config.meanings import settings

        section = args.arguments[0] if args.arguments else ""
        found = [setting for setting in settings() if setting.key.startswith(section)]
        if not found:
            raise UsageError(
                f"no setting starts with {section}", nearest(section, list(flat_keys(Config()))), "retro config keys"
            )
        for setting in found:
            print(json.dumps(asdict(setting)) if args.json else setting)
    else:
        if len(args.arguments) != 2:
            raise UsageError("config diff compares two files", "", "retro config diff A.yaml B.yaml")
        left, right = (flat_keys(load_config(None, None, file)) for file in args.arguments)
        for key in left:
            if left[key] != right[key]:
                print(f"{key}: {left[key]} -> {right[key]}")
    return 0
