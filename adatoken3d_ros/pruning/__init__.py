# SPDX-License-Identifier: Apache-2.0
"""Which spatial tokens reach which decoder layer, and what that saves."""
