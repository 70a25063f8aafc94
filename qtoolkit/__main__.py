"""`python -m qtoolkit` is the same as `qtoolkit`."""

from qtoolkit.cli import main

main()
