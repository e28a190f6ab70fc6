"""``python -m hedged``: the command line."""

from hedged.cli import main

main()
