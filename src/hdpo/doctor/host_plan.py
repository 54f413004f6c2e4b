"""What a node's host memory will hold, by phase: what slept, what is parked, what is saved, pictures, tools.

Weights, optimizer state and copies are exact sums; processes, pictures, server and sessions are estimates, each a constant
below with what it stands on. All sizes are bytes of one node. Page cache (weights and data read from files) is left out: the
kernel gives it back.
"""
from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from hdpo.config import Config
from hdpo.toolserver.layout import SESSION_MIB

if TYPE_CHECKING:
    from hdpo.doctor.memory_plan import Shapes

GIB, MIB = 2**30, 2**20
