"""The command line, ``geco-fast`` or ``python -m geco_fast``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; its libraries come with the extra ``geco-fast[train]``."""
    try:
        from geco_fast.cli.main import cli
    except ModuleNotFoundError as error:
        print(f"Error: {error.name} is missing; pip install 'geco-fast[train]'", file=sys.stderr)
        raise SystemExit(2) from None
    cli(prog_name="geco-fast")
