"""`python -m resshift.command` is `resshift`."""

from __future__ import annotations

import sys

from resshift.command.main import main

if __name__ == "__main__":
    sys.exit(main())
