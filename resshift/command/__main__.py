"""`python -m resshift.command` is `resshift`."""

from __future__ import annotations

import sys

from resshift.command.main import main

sys.exit(main())
