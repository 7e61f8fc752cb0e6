"""`python -m analysis [RUNS …] [--out report]`: the report over whatever runs exist."""

import sys

from gradflow.report import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m analysis"))
