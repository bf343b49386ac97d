# SPDX-License-Identifier: Apache-2.0
"""From a question to an answer: the scene session and its worker thread."""
