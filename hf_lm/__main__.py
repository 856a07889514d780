"""`python -m hf_lm` is the `hf-lm` command."""

import sys

from hf_lm.cli import main

sys.exit(main())
