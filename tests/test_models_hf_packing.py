"""Documents packed in the rows of Hugging Face models: each is computed as it is alone, padding beside them or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dilated_attention import ConfigError, Full
from dilated_attention.models import register_with_transformers
from dilated_attention.models.hf_packing import packed_lengths

from .hf_kit import DILATED, H, S, model, tokens
from .model_kit import padding
from .support import error


def test_packed_documents_are_each_alone() -> None:
    llama = model()
    register_with_transformers(llama, DILATED)
    for batch in (1, 2):
        seen, lengths = tokens(batch), [9, 1, 11]
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        alone = torch.cat([llama(part).logits for part in torch.split(seen, lengths, dim=1)], dim=1)
        assert error(llama(seen, position_ids=positions).logits, alone) < 1e-5
        assert error(llama(seen).logits, alone) > 1e-3
    ends = torch.tensor([0, 9, 10, 21], dtype=torch.int32)
    seen = tokens(1)
    told = llama(seen, position_ids=positions, cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=11, max_length_k=11)
    assert (
        error(told.logits, torch.cat([llama(part).logits for part in torch.split(seen, lengths, dim=1)], dim=1)) < 1e-5
    )
    with pytest.raises(ConfigError, match="must be equal"):
        llama(seen, cu_seq_lens_q=ends, cu_seq_lens_k=ends + 1)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("left", [False, True])
def test_packed_documents_beside_padding(is_causal: bool, left: bool) -> None:
    """Eager attention takes such a row for one document, as it does beside a mask of ones."""
    mine, seen, lengths = model(is_causal=is_causal), tokens(3), ([9, 1, 11], [8, 5], [17])
    mask = ~padding(*map(sum, lengths), length=S, left=left)
    positions = torch.full_like(seen, 7)
    expected: list[Tensor] = []
    for pattern in (DILATED, Full()):
        register_with_transformers(mine, pattern)
        expected.clear()
        for row, counts in enumerate(lengths):
            positions[row, mask[row]] = torch.cat([torch.arange(n) for n in counts])
            expected += [mine(part[None]).logits[0] for part in torch.split(seen[row, mask[row]], counts)]
        given = {"position_ids": positions, "attention_mask": mask.long()}
        assert error(mine(seen, **given).logits[mask], torch.cat(expected)) < 1e-5
        twin = mine(seen, position_ids=positions, attention_mask=torch.ones_like(seen)).logits
        assert error(twin[0], torch.cat(expected[:3])) < 1e-5
    read = [packed_lengths({"position_ids": positions}, None, absent, batch=3, is_self=True) for absent in [~mask] * 2]
    assert read[0] is read[1]  # the host reads them once for all layers
    ends = torch.tensor([0, 8, 13], dtype=torch.int32)
    with pytest.raises(ConfigError, match="cu_seq_lens_q stands beside an attention_mask with padding"):
        mine(seen[1:2], attention_mask=mask[1:2].long(), cu_seq_lens_q=ends, cu_seq_lens_k=ends)


@pytest.mark.parametrize("kind", ["Llama", "GPTBigCode"])
@pytest.mark.parametrize("batch", [1, 2])
def test_packed_documents_whether_or_not_the_attention_is_handed_position_ids(kind: str, batch: int) -> None:
    small = {"n_embd": 32, "n_layer": 2, "n_head": H, "n_positions": 64} if kind == "GPTBigCode" else {}
    mine, seen, lengths = model(kind, **small), tokens(batch), [9, 1, 11]
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(batch, -1)
    dense = mine(seen, position_ids=positions, use_cache=False).logits
    register_with_transformers(mine, Full())
    assert error(mine(seen, position_ids=positions, use_cache=False).logits, dense) < 1e-5
    register_with_transformers(mine, DILATED)
    alone = torch.cat([mine(part).logits for part in torch.split(seen, lengths, dim=1)], dim=1)
    assert error(mine(seen, position_ids=positions, use_cache=False).logits, alone) < 1e-5
    assert error(mine(seen).logits, alone) > 1e-3
