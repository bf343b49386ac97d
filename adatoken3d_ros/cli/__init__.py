# SPDX-License-Identifier: Apache-2.0
"""The adatoken3d command, one file a sub-command."""
