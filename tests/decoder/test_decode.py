# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.decoder.decode import decode, generate
from adatoken3d_ros.pruning.schedule import Schedule
from tests.decoder.prompts import SCHEDULES, SINGLE, run


def test_stock_forward_decodes_over_the_ragged_cache(decoder: Decoder) -> None:
    ours, stock = (run(decoder, SINGLE, SCHEDULES["two"], "ours") for _ in range(2))
    for token in (3, 141, 59):
        expected = decode(decoder, ours, token)
        with torch.no_grad():
            actual = decoder.language(input_ids=torch.tensor([[token]]), past_key_values=stock.cache).logits[0, -1]
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_stock_generate_decodes_over_the_ragged_cache(decoder: Decoder) -> None:
    ours, stock = (run(decoder, SINGLE, SCHEDULES["two"], "ours") for _ in range(2))
    expected = list(generate(decoder, ours, max_new_tokens=6, eos_ids=()))
    seen = torch.zeros(1, 53, dtype=torch.long)  # 52 cached tokens, whose ids do not matter, and the first new one
    seen[0, -1] = expected[0]
    out = decoder.language.generate(input_ids=seen, past_key_values=stock.cache, max_new_tokens=5, do_sample=False)
    assert out[0, 52:].tolist() == expected


def test_the_ragged_cache_rolls_back(mha: Decoder) -> None:
    result = run(mha, SINGLE, SCHEDULES["two"], "ours")
    mark, position = result.cache.lengths, result.next_position
    first = [decode(mha, result, token) for token in (5, 6, 7)]
    result.cache.crop(-1)
    result.cache.roll_back(mark)
    result.next_position = position
    again = [decode(mha, result, token) for token in (5, 6, 7)]
    assert torch.equal(torch.stack(first), torch.stack(again))


def test_greedy_ids_equal_the_stock_model(decoder: Decoder) -> None:
    ids = list(generate(decoder, run(decoder, SINGLE, Schedule(), "none"), max_new_tokens=10, eos_ids=()))
    expected = decoder.language.generate(
        inputs_embeds=SINGLE.embeds, max_new_tokens=10, do_sample=False, eos_token_id=None
    )
    assert ids == expected[0].tolist()


def test_generation_ends_at_eos_and_at_the_limit(mha: Decoder) -> None:
    def ids(**options: object) -> list[int]:
        return list(generate(mha, run(mha, SINGLE, SCHEDULES["one"], "ours"), **options))

    full = ids(max_new_tokens=9, eos_ids=())
    assert len(full) == 9
    end = next(i for i in range(1, 9) if full[i] not in full[:i])
    assert ids(max_new_tokens=9, eos_ids={full[end]}) == full[:end]
    assert ids(max_new_tokens=0, eos_ids=()) == []


def test_generation_stops_within_one_step(mha: Decoder) -> None:
    stop = False
    stream = generate(
        mha, run(mha, SINGLE, SCHEDULES["one"], "ours"), max_new_tokens=50, eos_ids=(), should_stop=lambda: stop
    )
    got = [next(stream), next(stream)]
    stop = True
    assert len(got + list(stream)) == 2
