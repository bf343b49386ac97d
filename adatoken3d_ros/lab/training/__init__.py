# SPDX-License-Identifier: Apache-2.0
"""Training of the small model on furnished rooms: scenes, packed questions, losses, the loop."""
