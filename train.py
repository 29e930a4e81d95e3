"""`python train.py RECIPE [key=value ...]` is `infctx train RECIPE [key=value ...]`."""

import sys

from infctx.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
