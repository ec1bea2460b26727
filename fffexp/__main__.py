"""`python -m fffexp` is the same program as `fffexp`."""

from fffexp.cli import main

raise SystemExit(main())
