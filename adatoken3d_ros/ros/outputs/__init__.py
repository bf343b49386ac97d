# SPDX-License-Identifier: Apache-2.0
"""From what happened to messages, and the topics that they leave on."""
