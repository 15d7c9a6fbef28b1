"""What runs behind an `Attention`: lowered programs by length, and one kernel that computes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, NoReturn

import attrs
import torch
from torch import Tensor
from torch.autograd import profiler
from torch.utils._python_dispatch import _disable_current_modes

from . import composed
from .band_calls import dense_form
from .block_product import BlockProduct, block_table
from .cache import ByteLRU
from .capture import is_captured
from .composed import Composers
from .config import AttentionConfig
from .counters import AttentionCounters, Tally
from .document_programs import DocumentPrograms
from .dropping import of_one_pass, one_by_one, refuse_capture
from .dynamic_tables import DynamicTables
from .empty import empty_gradients, empty_results
from .errors import ConfigError
from .geometry import Geometry
from .kernel import DenseKernel, LayoutKernel, LayoutPiece, Packs, Prepares, takes_windows
from .layout import Layout
from .lowering import lower
from .pattern import LearnedPattern, Pattern
from .program import Program
from .received import received_from
from .schedule import Schedule, schedule
from .tracing import span

if TYPE_CHECKING:
    from typing import Any

    from .composer import Composer
    from .documents import Packing
    from .kernel import BlockTable


class Engine:
    """Computes one configuration's attention, forward and backward, for any length.

    Shapes: query (B, S, H, D), key and value (B, T, K, D), out like query, lse (B, H, S). An engine holds no parameters
    and is shared by copies of the module that owns it.

    Args:
        config: the configuration; its dtype is that of all inputs.
        pattern: its pattern, resolved.
        kernel: computes dense pieces, or whole layouts where `takes_layout`.
        takes_layout: which of the two kernel protocols `kernel` follows.
        has_dlse: the kernel can bring the gradient through lse home (dense kernels: by 8 more columns of head_dim).
        call_axes: those of `CALL_AXES` that the backend declares; calls that need another one are refused.
        backend: its name, for counters and traces.
        kernel_name: what the plan says computes it, likewise; the kernel's own name where none is given.
        plan: digest of the plan, likewise.
    """

    def __init__(
        self,
        config: AttentionConfig,
        pattern: Pattern,
        kernel: DenseKernel | LayoutKernel,
        *,
        takes_layout: bool,
        has_dlse: bool,
        call_axes: frozenset[str],
        backend: str = "",
        kernel_name: str = "",
        plan: str = "",
    ) -> None:
        self.config = config
        self.backend = backend
        self.kernel_name = kernel_name or kernel.name
        self.plan = plan
        self.pattern = pattern
        named = pattern.unwrap()
        self._learned = named if isinstance(named, LearnedPattern) else None
        self.kernel = kernel
        self.takes_layout = takes_layout
        self.scale = config.softmax_scale
        self._layout_kernel: LayoutKernel | None = kernel if takes_layout else None  # type: ignore[assignment]
        self._composers: Composers | None = None
        if not takes_layout:
            self._composers = Composers.of(kernel, self.scale, config)  # type: ignore[arg-type]
        self.has_dlse = has_dlse
        self.call_axes = call_axes
        self.programs: ByteLRU[tuple[Any, ...], Program] = ByteLRU(config.limits.pattern_cache_bytes)
        self._document_programs: DocumentPrograms | None = None
        if takes_layout and isinstance(kernel, Packs):
            self._document_programs = DocumentPrograms(self.programs, kernel, pattern, config)
        self.forwards, self.backwards = Tally(), Tally()
        # Stable across processes, so that compiled graphs may be cached; equal keys compute equal things.
        origin = (type(kernel).__module__, type(kernel).__qualname__, kernel.name)
        identity = repr((plan, config, pattern, origin, takes_layout, has_dlse, sorted(call_axes)))
        self.key = sha256(identity.encode()).hexdigest()
        self._forward_name, self._backward_name = self.range_name("forward"), self.range_name("backward")

    def __reduce__(self) -> NoReturn:
        raise TypeError("an attention is not pickled; save config.to_dict() and state_dict(), and build it anew")

    def __deepcopy__(self, memo: dict[int, object]) -> Engine:
        return self

    def range_name(self, what: str) -> str:
        """`dilated_attention sdpa forward (plan 1f2e3d4c5b6a)`: a range of this engine in a trace."""
        return f"dilated_attention {self.backend} {what} (plan {self.plan})"

    def counters(self) -> AttentionCounters:
        """What it has computed by now, for all attentions that it serves."""
        head_dim = self.config.head_dim
        return AttentionCounters(
            plan=self.plan,
            backend=self.backend,
            kernel=self.kernel_name,
            forward=self.forwards.total(4 * head_dim),
            backward=self.backwards.total(10 * head_dim),
            layouts=self.programs.counters,
        )

    def prepare(
        self, q_len: int, kv_len: int, q_offset: int, kv_offset: int, device: torch.device, *, drops: bool = False
    ) -> Layout:
        """Lower the pattern for these lengths, or find it lowered; returns the layout. `drops` as calls with a seed do.

        Raises:
            ConfigError: during the capture of a CUDA graph, which must find the length already lowered.
        """
        return self._program(q_len, kv_len, q_offset, kv_offset, device, drops=drops).layout

    def _program(
        self, q_len: int, kv_len: int, q_offset: int, kv_offset: int, device: torch.device, *, drops: bool = False
    ) -> Program:
        # A kernel for whole layouts drops by itself.
        key = (q_len, kv_len, q_offset, kv_offset, device, drops and not self.takes_layout)
        found = self.programs.get(key)
        if found is not None:
            return found
        if is_captured(device):
            raise ConfigError(
                f"seq_len {q_len} (keys {kv_len}, offsets {q_offset} and {kv_offset}) is met for the first time while "
                f"a CUDA graph is captured; call attention.prepare({q_len}, kv_len={kv_len}) before the capture"
            )
        with span(self.range_name("lower")), _disable_current_modes():  # no fake tensors among those that are kept
            return self.programs.get_or_make(key, lambda: self._make_program(*key))

    def _for_call(
        self,
        query: Tensor,
        key: Tensor,
        q_offset: int,
        kv_offset: int,
        seed: Tensor | None,
        packing: Packing | None,
    ) -> Program:
        if packing is not None:
            return self._packed(packing, query.device)
        if seed is not None:
            refuse_capture(self.config.dropout_p, seed, query.device)
        lengths = query.shape[1], key.shape[1]
        return self._program(*lengths, q_offset, kv_offset, query.device, drops=seed is not None)

    def _packed(self, packing: Packing, device: torch.device) -> Program:
        """The program of documents that the kernel computes together."""
        found = self.programs.get((packing, device))
        if found is not None:
            return found
        assert self._document_programs is not None
        self._check_call(packing.q_len, packing.kv_len, packing.kv_len - packing.q_len, 0)
        with span(self.range_name("lower")), _disable_current_modes():
            return self._document_programs.program(packing, device)

    def _make_program(
        self, q_len: int, kv_len: int, q_offset: int, kv_offset: int, device: torch.device, drops: bool
    ) -> Program:
        config = self.config
        self._check_call(q_len, kv_len, q_offset, kv_offset)
        geometry = config.geometry(q_len, kv_len, q_offset=q_offset, kv_offset=kv_offset)
        if self._layout_kernel is None:
            program = self._composed(geometry, device, self.kernel, drops=drops)
            return attrs.evolve(program, schedule=one_by_one(program.schedule)) if drops else program
        layout = Layout(self.pattern, geometry, (), None)
        if self._learned is None:
            layout = lower(self.pattern, geometry, limit_bytes=config.limits.layout_bytes)
        program = Program(layout, Schedule((), 0))
        if isinstance(self._layout_kernel, Prepares) and program.pairs:
            return attrs.evolve(program, prepared_bytes=self._layout_kernel.prepare(layout, device))
        return program

    def _composed(
        self, geometry: Geometry, device: torch.device, kernel: object = None, *, drops: bool = False
    ) -> Program:
        """The program that core itself runs, with dense pieces, and with blocks unless `kernel` computes those.

        It does where they are all there is: its results, of the inputs' dtype, are not merged. A program that `drops`
        has no windows as squares, whose rows are read backwards.
        """
        if self._learned is not None:
            return self._make_dynamic(self._learned, geometry, device)
        windows = self.takes_layout or takes_windows(self.kernel)
        dense = dense_form(self.pattern, geometry, windows=windows)
        if dense is not None and (windows or not (drops and dense.bands)):
            return Program(Layout(self.pattern, geometry, dense.branches, None), dense.schedule, bands=dense.bands)
        layout = lower(self.pattern, geometry, limit_bytes=self.config.limits.layout_bytes)
        assert layout.blocks is not None
        alone = kernel if not (layout.branches or drops) else None
        blocks = block_table(layout.blocks, alone, scale=self.scale, config=self.config, device=device)
        return Program(layout, schedule(layout.branches, geometry), blocks)

    def _check_call(self, q_len: int, kv_len: int, q_offset: int, kv_offset: int) -> None:
        """Raise `ConfigError` for lengths or offsets that the backend does not declare, or that are being traced."""
        if torch._C._is_tracing():  # there lengths are tensors, which no program can be made for
            raise ConfigError("torch.jit.trace cannot trace an attention; use torch.compile or torch.export")
        if q_len != kv_len and "unequal_lengths" not in self.call_axes:
            raise ConfigError(
                f"{q_len} queries against {kv_len} keys: the backend of kernel {self.kernel.name!r} takes equal "
                "lengths only (it does not declare unequal_lengths); build with another backend"
            )
        if (q_offset, kv_offset) != (kv_len - q_len, 0) and "offsets" not in self.call_axes:
            raise ConfigError(
                f"q_offset={q_offset}, kv_offset={kv_offset}: the backend of kernel {self.kernel.name!r} takes the "
                f"default offsets only ({kv_len - q_len} and 0; it does not declare offsets); build with another "
                "backend"
            )

    def _make_dynamic(self, pattern: LearnedPattern, geometry: Geometry, device: torch.device) -> Program:
        """What is known of blocks that are chosen per call; nothing where there are no queries or no keys."""
        program = Program(Layout(pattern, geometry, (), None), Schedule((), 0))
        if not (geometry.q_len and geometry.kv_len):
            return program
        dynamic = DynamicTables.prepare(
            pattern,
            geometry,
            scale=self.scale,
            device=device,
            dtype=getattr(torch, self.config.dtype),
            workspace_bytes=self.config.limits.workspace_bytes,
        )
        return attrs.evolve(program, dynamic=dynamic)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        q_offset: int,
        kv_offset: int,
        seed: Tensor | None,
        tables: Tensor | None,
        *,
        calls: int = 1,
        lengths: Sequence[int] | None = None,
        packing: Packing | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return out, in the inputs' dtype, and lse, both contiguous; rows without keys give 0 and -inf.

        `tables` (B, H, R, k) int64 names the blocks of a learned pattern (`Gate.forward`), and is None for
        every other. `calls` is what counters count it as: 0 for what belongs to a call that is counted already;
        `lengths` are how many tokens of each batch row are counted, if not all. With a `packing` each of its documents
        is a sequence of its own, and there are no offsets.
        """
        # All that kernels ask of strides, but for what is drawn.
        if seed is not None or query.stride()[3] != 1 or key.stride()[3] != 1 or value.stride()[3] != 1:
            query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        batch = query.shape[0]
        program = self._for_call(query, key, q_offset, kv_offset, seed, packing)
        bound = program if tables is None else program.bound(tables)
        if profiler._is_profiler_enabled:  # as `span` asks, of which 0.2 us show in a tiny call
            with span(self._forward_name):
                results = self._forward(bound, query, key, value, seed, tables, lengths is not None)
        else:
            results = self._forward(bound, query, key, value, seed, tables, lengths is not None)
        self.forwards.add(calls, *program.counted(batch, lengths))
        return results

    def _forward(
        self,
        program: Program,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        seed: Tensor | None,
        tables: Tensor | None,
        is_filled: bool,
    ) -> tuple[Tensor, Tensor]:
        if not (program.pairs and query.numel()):
            return empty_results(query)
        if self._layout_kernel is not None:
            out, lse = self._layout_kernel.forward(query, key, value, self._piece(program, seed, tables))
            return out.contiguous(), lse.contiguous()
        composer, blocks = self._of_pass(program, query, key, seed, is_filled)
        out, lse = composed.forward(composer, program.schedule, blocks, query, key, value)
        if out.dtype != query.dtype:
            out = out.to(query.dtype)
        return out.contiguous(), lse.contiguous()

    def backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        q_offset: int,
        kv_offset: int,
        seed: Tensor | None,
        tables: Tensor | None,
        *,
        calls: int = 1,
        lengths: Sequence[int] | None = None,
        packing: Packing | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk, dv, contiguous, in the inputs' dtype: the exact gradients of `forward` (through lse too)."""
        self._check_dlse(dlse)
        with span(self._backward_name):
            if seed is not None or any(x.stride(3) != 1 for x in (dout, query, key, value, out)):
                dout, query, key, value, out = (x.contiguous() for x in (dout, query, key, value, out))
            batch = query.shape[0]
            program = self._for_call(query, key, q_offset, kv_offset, seed, packing)
            bound = program if tables is None else program.bound(tables)
            if not (program.pairs and query.numel()):
                dq, dk, dv = empty_gradients(query, key, value)
            elif self._layout_kernel is not None:
                piece = self._piece(bound, seed, tables)
                dq, dk, dv = self._layout_kernel.backward(dout, query, key, value, out, lse, piece, dlse=dlse)
            else:
                composer, blocks = self._of_pass(bound, query, key, seed, lengths is not None)
                of_program = composer, bound.schedule, blocks
                dq, dk, dv = composed.backward(*of_program, dout, dlse, query, key, value, out, lse)
            grads = dq.to(query.dtype).contiguous(), dk.to(key.dtype).contiguous(), dv.to(value.dtype).contiguous()
        self.backwards.add(calls, *program.counted(batch, lengths))
        return grads

    def _of_pass(
        self, program: Program, query: Tensor, key: Tensor, seed: Tensor | None, is_filled: bool
    ) -> tuple[Composer, BlockTable | None]:
        """What computes dense pieces, and what computes blocks."""
        assert self._composers is not None
        if seed is not None:
            return of_one_pass(self._composers.own, program.blocks, self.config.dropout_p, seed, query.device)
        return self._composers.for_call(query.shape[1], key.shape[1], is_filled), program.blocks

    def received(
        self, query: Tensor, key: Tensor, lse: Tensor, q_offset: int, kv_offset: int, tables: Tensor | None
    ) -> Tensor:
        """The attention that each key receives: sum over queries of m exp(s - lse), (B, H, T) in lse's dtype.

        Core computes it, whatever the kernel.
        """
        q_len, kv_len, device = query.shape[1], key.shape[1], query.device
        if query.numel() == 0 or key.numel() == 0:
            return lse.new_zeros(query.shape[0], query.shape[2], kv_len)
        program = None if self.takes_layout else self._program(q_len, kv_len, q_offset, kv_offset, device)
        if program is None or not isinstance(program.blocks, BlockProduct | None):
            geometry = self.config.geometry(q_len, kv_len, q_offset=q_offset, kv_offset=kv_offset)
            program = self.programs.get_or_make((geometry, device), lambda: self._composed(geometry, device))
        if tables is not None:
            program = program.bound(tables)
        lse = torch.where(lse == -math.inf, math.inf, lse)  # rows without keys give nothing
        limit = self.config.limits.workspace_bytes
        total = received_from(query, key, lse, program.schedule, scale=self.scale, workspace_bytes=limit)
        if program.blocks is None:
            return total
        assert isinstance(program.blocks, BlockProduct)
        return total + program.blocks.received(query, key, lse)

    def _check_dlse(self, dlse: Tensor | None) -> None:
        """Raise `ConfigError` for a gradient through lse that the kernel cannot carry."""
        if dlse is not None and not self.has_dlse:
            raise ConfigError(
                f"the backend's kernel {self.kernel.name!r} cannot carry a gradient through lse at "
                f"head_dim={self.config.head_dim}; detach lse, or build with another backend"
            )

    def _piece(self, program: Program, seed: Tensor | None, tables: Tensor | None) -> LayoutPiece:
        return LayoutPiece(
            layout=program.layout,
            scale=self.scale,
            deterministic=self.config.deterministic,
            dropout_p=self.config.dropout_p if seed is not None else 0.0,
            seed=seed,
            tables=tables,
            packing=program.packing,
        )
