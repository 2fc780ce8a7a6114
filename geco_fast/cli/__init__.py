"""The command line, ``geco-fast`` or ``python -m geco_fast``."""

from __future__ import annotations

import sys

from geco_fast._backend import default_backend
from geco_fast._info import info


def main() -> None:
    """Run the command line; its libraries come with the extra ``geco-fast[train]``."""
    try:
        default_backend()
        from geco_fast.cli.main import cli
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except ModuleNotFoundError as error:
        if sys.argv[1:] == ["info"]:
            print(info())
            return
        print(f"Error: {error.name} is missing; pip install 'geco-fast[train]'", file=sys.stderr)
        raise SystemExit(2) from None
    cli(prog_name="geco-fast")
