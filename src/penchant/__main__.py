"""``python -m penchant``."""

from __future__ import annotations

import sys

from penchant.cli import main

sys.exit(main())
