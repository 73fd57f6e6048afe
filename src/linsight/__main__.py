"""`python -m linsight`."""

from linsight.cli import main

main()
