# SPDX-License-Identifier: Apache-2.0
"""LLaVA-3D on Hugging Face transformers."""
