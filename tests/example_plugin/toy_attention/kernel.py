from torch import Tensor as T
from torch import einsum, exp, inf, ones_like

from dilated_attention.registry import DensePiece, KernelBackend


class Toy(KernelBackend):
    name = "toy"

    def scores(self, q: T, k: T, piece: DensePiece) -> T:
        s = piece.scale * einsum("bshd,bthd->bhst", q, k)
        return s.masked_fill(ones_like(s).triu(1) > 0, -inf) if piece.is_causal else s

    def forward(self, q: T, k: T, v: T, piece: DensePiece) -> tuple[T, T]:
        s = self.scores(q, k, piece)
        lse = s.logsumexp(-1)
        return einsum("bhst,bthd->bshd", exp(s - lse[..., None]), v), lse

    def backward(self, dout: T, q: T, k: T, v: T, out: T, lse: T, piece: DensePiece) -> tuple[T, T, T]:
        p = exp(self.scores(q, k, piece) - lse[..., None])
        delta = einsum("bshd,bshd->bhs", dout, out)[..., None]
        ds = piece.scale * p * (einsum("bshd,bthd->bhst", dout, v) - delta)
        dq, dk = einsum("bhst,bthd->bshd", ds, k), einsum("bhst,bshd->bthd", ds, q)
        return dq, dk, einsum("bhst,bshd->bthd", p, dout)
