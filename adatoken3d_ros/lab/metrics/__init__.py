# SPDX-License-Identifier: Apache-2.0
"""How right answers are, by the measures of the published question sets."""
