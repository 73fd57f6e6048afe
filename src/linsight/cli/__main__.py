"""`python -m linsight.cli`."""

from . import main

main()
