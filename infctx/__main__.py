"""`python -m infctx` is `infctx`."""

from infctx.cli import main

main()
