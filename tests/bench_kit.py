"""What the tests of `bench` share: cases of a blink, and peers that are right, wrong, or wrong only when long."""

from __future__ import annotations

from typing import Any

import attrs
from torch import Tensor

from dilated_attention import Dilated, Global, Local, build_attention
from dilated_attention.bench.cases import BenchCase
from dilated_attention.bench.peers import Peer
from dilated_attention.bench.ring_settings import RingSettings

TINY = BenchCase(
    name="tiny",
    pattern=Dilated((64, 128, 256), (1, 2, 4), offsets="blocked"),
    gate_pattern=Dilated((16, 32, 64), (1, 2, 4), offsets="blocked"),
    gate_len=64,
    seq_len=256,
    num_heads=4,
    head_dim=16,
    dtype="float32",
    is_causal=True,
    device="cpu",
    is_default=False,
)
BLOCKS = attrs.evolve(TINY, name="blocks", pattern=Local((31, 0)) | Global(8), gate_pattern=Local((15, 0)) | Global(4))


def _ours(case: BenchCase, device: str) -> Peer:
    attention = build_attention(case.config("auto", device=device))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = attention(query, key, value)
        return out

    return Peer("right", attend)


def right(case: BenchCase, device: str) -> Peer:
    """Ours again."""
    return _ours(case, device)


def none(case: BenchCase, device: str) -> None:
    """A peer that takes no case."""


def wrong(case: BenchCase, device: str) -> Peer:
    """Off by 1 % in the gradients alone."""
    peer = _ours(case, device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return peer.attend(query, key + (0.01 * key - (0.01 * key).detach()), value)

    return Peer("wrong", attend)


def wrong_when_long(case: BenchCase, device: str) -> Peer:
    """Right at the length of the gate, off by 1 % at the full length."""
    peer = _ours(case, device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = peer.attend(query, key, value)
        return out * 1.01 if case.seq_len > TINY.gate_len else out

    return Peer("wrong when long", attend)


def failing(case: BenchCase, device: str) -> Peer:
    """Asks for more memory than there is."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return query.new_empty(1 << 60)

    return Peer("failing", attend)


def raising(case: BenchCase, device: str) -> Peer:
    """Does not even come to be."""
    raise KeyError(case.name)


def failing_otherwise(case: BenchCase, device: str) -> Peer:
    """Raises what no kernel does."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raise TypeError("no tensors, please")

    return Peer("failing otherwise", attend)


def ring_figures(settings: str) -> dict[str, Any]:
    """What one of two real ranks measures for `--scaling`; its oracle has a sixteenth of the pairs."""
    from dilated_attention.bench import ring_worker

    from .ring_cases import mesh_of

    ring_worker.SHORT = 256
    return ring_worker.run(RingSettings.from_json(settings), mesh_of(2))


def ring_refused(settings: str) -> str:
    """What a rank says where results are further off the oracle than a bound that none can keep."""
    from dilated_attention.bench import contenders

    kept = contenders.BOUNDS["float32"]
    contenders.BOUNDS["float32"] = 1e-12
    try:
        ring_figures(settings)
    except SystemExit as stopped:
        return str(stopped.code)
    finally:
        contenders.BOUNDS["float32"] = kept
    return "it went on"
