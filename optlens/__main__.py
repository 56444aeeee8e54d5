"""Run the command line as `python -m optlens`."""

import sys

from optlens.cli import main

if __name__ == "__main__":
    sys.exit(main())
