"""What torch.compile does not trace breaks the graph once, and is not compiled again for every length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from dilated_attention import Attention, Learned, Local, Pattern, Random, build_attention
from dilated_attention.models import LongNetConfig, LongNetLM

from .distributions import run

PATTERNS = [Local(8), Random(block_size=8, blocks_per_row=2, seed=0), Learned(block_size=8, blocks_per_row=2)]


def build(pattern: Pattern) -> Attention:
    return build_attention(pattern=pattern, num_heads=4, head_dim=16, is_causal=True)


def compiled(function: Any, backend: Any = "aot_eager") -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend=backend)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_calls_of_the_host(pattern: Pattern) -> None:
    attention, (query, key, value) = build(pattern), torch.randn(3, 2, 20, 4, 16)
    compiled(attention.prepare)(99)
    _, lse = attention(query, key, value, return_lse=True)
    assert torch.equal(compiled(attention.received)(query, key, lse), attention.received(query, key, lse))
    assert compiled(attention.make_cache)(2).seq_len == 0
    assert compiled(attention.counters)() == attention.counters()


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_steps_are_not_compiled_for_every_position(pattern: Pattern) -> None:
    attention, inputs = build(pattern), torch.randn(3, 2, 40, 4, 16)

    def steps(run: Any) -> Tensor:
        cache = attention.make_cache(2)
        return torch.cat([run(*inputs[:, :, i : i + 1], cache) for i in range(40)], dim=1)

    def doubled(query: Tensor, key: Tensor, value: Tensor, cache: Any) -> Tensor:
        return attention.step(query * 1.0, key, value, cache) * 2

    count = CompileCounter()
    assert torch.equal(steps(compiled(doubled, count)), 2 * steps(attention.step))
    assert count.frame_count <= 3  # before and after the step; once more where out is a view, whose strides change


@pytest.mark.slow
def test_generation() -> None:
    config = LongNetConfig(
        pattern=Local(8), embed_dim=32, num_layers=2, num_heads=4, ffn_dim=48, vocab_size=23, positions="rotary"
    )
    torch.manual_seed(0)
    model, prompt = LongNetLM(config).eval(), torch.randint(23, (2, 9))
    expected, counts = model.generate(prompt, 14), []
    for new_tokens in (4, 14):
        count = CompileCounter()
        assert torch.equal(compiled(model.generate, count)(prompt, new_tokens), expected[:, : 9 + new_tokens])
        counts.append(count.frame_count)
    assert counts[0] == counts[1]


def test_eager_calls_do_not_load_the_compiler() -> None:
    code = (
        "import sys, torch; from dilated_attention import Full, build_attention; "
        "a = build_attention(pattern=Full(), num_heads=1, head_dim=8, is_causal=True); x = torch.ones(1, 1, 1, 8); "
        "a.prepare(3); a.step(x, x, x, a.make_cache(1)); print('torch._dynamo' in sys.modules)"
    )
    assert run(None, "-c", code).stdout.strip() == "False"
