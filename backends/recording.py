"""For backends whose backward is that of a forward computed again: autograd inside an operator, and parts of rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def recording() -> Iterator[None]:
    """Autograd records, inside an operator too: there the dispatcher has left autograd's keys behind."""
    with torch.enable_grad(), _autograds_keys_excluded(False):
        yield


@contextmanager
def not_recording() -> Iterator[None]:
    """As inside an operator, wherever it is called from: what is compiled for one is not compiled for others again."""
    with torch.no_grad(), _autograds_keys_excluded(True):
        yield


@contextmanager
def _autograds_keys_excluded(are: bool) -> Iterator[None]:
    keys = torch._C.DispatchKey
    with (
        torch._C._SetExcludeDispatchKeyGuard(keys.AutogradFunctionality, are),
        torch._C._SetExcludeDispatchKeyGuard(keys.ADInplaceOrView, are),
    ):
        yield


def of_part(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """From the gradients of whole rows' `out` and `lse` to those of a part of them (`LayoutPiece.is_part`).

    out = sum_i c_i out_i with c_i = exp(lse_i - lse), so d out / d out_i = c_i and d out / d lse_i = c_i (out_i - out).
    Both come in the wider of the dtypes of the part's out and lse.
    """
    wide = torch.promote_types(part.dtype, part_lse.dtype)
    dout, out, lse, part, part_lse = (x.to(wide) for x in (dout, out, lse, part, part_lse))
    share = torch.exp(part_lse - lse).nan_to_num(nan=0.0)  # -inf less -inf: a row without keys
    through_share = (dout * (part - out)).sum(-1).transpose(1, 2)
    dlse = through_share if dlse is None else through_share + dlse.to(wide)
    return dout * share.transpose(1, 2)[..., None], share * dlse
