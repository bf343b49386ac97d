# SPDX-License-Identifier: Apache-2.0
"""From frames and questions to answers: the engine, its scenes and the thread that owns them."""
