"""`python -m lowrank_align`: the same as the `lowrank-align` command."""

import sys

from lowrank_align.cli import main

sys.exit(main())
