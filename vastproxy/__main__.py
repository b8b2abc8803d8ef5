"""Run the command line: ``python -m vastproxy``."""

from vastproxy.cli import main

if __name__ == "__main__":
    main()
