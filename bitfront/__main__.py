"""`python -m bitfront`."""

from bitfront.cli import main

main()
