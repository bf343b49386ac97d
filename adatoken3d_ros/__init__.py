# SPDX-License-Identifier: Apache-2.0
"""Live 3D questions for robots: LLaVA-3D spatial tokens, pruned inside the model to meet a latency budget."""

import os

__version__ = "0.1.0"

# On a robot other programs want the cores, too. OpenMP's threads would spin while they wait for one that has lost its
# core, for milliseconds at each matrix product (docs/architecture.md); it reads this when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
