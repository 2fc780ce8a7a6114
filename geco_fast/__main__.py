"""``python -m geco_fast``: the command line."""

from geco_fast.cli import main

if __name__ == "__main__":
    main()
