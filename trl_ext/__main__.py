"""`python -m trl_ext` is the command `trl_ext`."""

import sys

from trl_ext.cli import main

sys.exit(main())
