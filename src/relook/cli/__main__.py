"""`python -m relook.cli`: the `relook` command where the script is not on the path."""

from relook.cli.app import main

main()
