# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from transformers import LlamaForCausalLM

from tests.pruning.oracle import tiny_llama


@pytest.fixture(scope="session", params=[4, 2], ids=["mha", "gqa"])
def language(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    """A random Llama with as many key/value heads as heads, then one with half of them."""
    return tiny_llama(request.param)


@pytest.fixture(scope="session")
def mha() -> LlamaForCausalLM:
    return tiny_llama()
