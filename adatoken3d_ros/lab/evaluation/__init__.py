# SPDX-License-Identifier: Apache-2.0
"""Published question sets, answered by a model under several strategies, and the table of how right they are."""
