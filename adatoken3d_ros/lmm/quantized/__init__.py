# SPDX-License-Identifier: Apache-2.0
"""Weights of a language model's linear layers in eight or four bits: what they are, and the products with them."""
