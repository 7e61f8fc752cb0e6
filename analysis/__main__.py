"""`python -m analysis [RUNS …] [--out report]`: the report over whatever runs exist, and the atlas
of the published findings over those of them that are theirs."""

import sys

import experiments
from gradflow.report import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m analysis", findings=experiments.load))
