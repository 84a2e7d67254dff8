"""`python -m cpt` is the command `cpt`."""

from cpt.cli import main

main()
