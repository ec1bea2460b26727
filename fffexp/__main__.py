"""`python -m fffexp` is the same program as `fffexp`."""

import sys

from fffexp.cli import main

sys.exit(main())
