# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: one file a question, a table on the screen, figures as JSON."""
