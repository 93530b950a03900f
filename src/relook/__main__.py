"""`python -m relook`: the command line, where the `relook` script is not on the path."""

from relook.cli import main

if __name__ == "__main__":
    main()
