# SPDX-License-Identifier: Apache-2.0
"""Live 3D questions for robots: LLaVA-3D spatial tokens, pruned inside the model to meet a latency budget."""

__version__ = "0.1.0"
