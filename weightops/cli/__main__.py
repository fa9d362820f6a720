"""`python -m weightops.cli`: the command line of whichever Python runs it."""

from weightops.cli.main import console

console()
