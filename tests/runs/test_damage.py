"""Damaged files, full disks, kills and exits: a run goes on bit for bit, or says which file it is and how to mend it."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny import polite_rows, tiny_model_folder, write_jsonl

from penchant import api
from penchant.base.files import ANYWHERE
from penchant.cli import main
from penchant.compare import CompareRequest, compare_runs
from penchant.errors import CheckpointError, DiskError, PenchantError, RewardError
from penchant.runfolder import damaged
