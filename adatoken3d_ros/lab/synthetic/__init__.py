# SPDX-License-Identifier: Apache-2.0
"""Synthetic rooms and the cameras that look at them."""
