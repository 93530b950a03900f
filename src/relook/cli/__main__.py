"""`python -m relook.cli`: the `relook` command without its script."""

from relook.cli.app import main

main()
