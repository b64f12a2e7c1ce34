"""The verbs of instances in `pyhv --help`; they are parsed and explained by hv/cli/words.py, which is faster.

Driven by tests/unit/test_cli_words.py.
"""

from __future__ import annotations

__all__ = ["add_verbs"]

import click

from hv.cli.verbs import VERBS, run_verb


def add_verbs(group: click.Group) -> None:
    """Add them all to the group of commands."""
    for verb, (_, _, _, what) in VERBS.items():
        group.add_command(_command(verb, what))


def _command(verb: str, what: str) -> click.Command:
    @click.command(verb, help=what, add_help_option=False,
                   context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def command(arguments: tuple[str, ...]) -> int:
        return run_verb([verb, *arguments])

    return command
