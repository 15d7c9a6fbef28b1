"""A distribution with the interface of FlashAttention-4 and its arithmetic on a CPU, as files to install.

It asserts what the library asks of its inputs, or would copy.
"""

from typing import Final

from . import dense_math  # noqa: F401 - the distribution imports it

STAND_IN: Final = {
    "flash_attn/cute/__init__.py": "",
    "cutlass/__init__.py": "from torch import bool as Boolean",
    "cutlass/cute/__init__.py": """
from . import runtime

def jit(function): return function

def compile(kernel, *arguments, options):
    assert options == "--enable-tvm-ffi"
    return kernel.compiled(*arguments)
""",
    "cutlass/cute/runtime.py": "def make_fake_stream(*, use_tvm_ffi_env_stream): return use_tvm_ffi_env_stream",
    "flash_attn/cute/utils.py": "def scalar_to_ssa(a, dtype): return a.to(dtype)",
    "flash_attn/cute/block_sparsity.py": """
from typing import Any, NamedTuple

class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: Any
    mask_block_idx: Any
    full_block_cnt: Any
    full_block_idx: Any
    block_size: tuple[int, int]
""",
    "flash_attn/cute/interface.py": """
from typing import Any, NamedTuple

import torch

from tests import dense_math

torch2cute_dtype_map = {dtype: dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}

class AuxData(NamedTuple):
    tensors: Any
    scalars: Any

class Tile(NamedTuple):
    m_block_size: int = 192
    n_block_size: int = 128
    mma_pv_is_rs: bool = True
    intra_wg_overlap: bool = True

def _tile_size_fwd_sm90(head_dim, head_dim_v, is_causal, is_local):
    assert head_dim == head_dim_v and not (is_causal and is_local)
    return Tile()

def to_cute_tensor(t, assumed_align, leading_dim=-1):
    assert t.data_ptr() % assumed_align == 0 and t.stride(leading_dim) == 1
    return t.dtype, [stride == 0 for stride in t.stride()]

class FlashAttentionForwardSm90:
    def __init__(self, dtype, head_dim, head_dim_v, qhead_per_kvhead, *, is_causal, is_local, pack_gqa, tile_m, tile_n,
                 num_stages, num_threads, intra_wg_overlap, mma_pv_is_rs, paged_kv_non_tma):
        assert head_dim == head_dim_v and pack_gqa == (qhead_per_kvhead > 1)
        self.head_dim, self.group, self.is_causal, self.is_local = head_dim, qhead_per_kvhead, is_causal, is_local

    def compiled(self, q, k, v, out, lse, scale, *others):
        *rest, stream = others
        assert stream

        def run(*arguments):
            given, more = arguments[:5], arguments[6:]
            assert [type(x) for x in more] == [type(x) for x in rest]
            assert not any(x.requires_grad for x in given)
            for x, compiled in zip(given, (q, k, v, out, lse), strict=True):
                assert to_cute_tensor(x, 16 if x.dim() == 4 else 4) == compiled
            assert given[0].shape[2] == given[1].shape[2] * self.group and given[0].shape[3] == self.head_dim
            window = more[5:7]
            assert (window != (None, None)) == self.is_local
            found = dense_math.forward(*given[:3], arguments[5], self.is_causal, window)
            for into, result in zip(given[3:], found, strict=True):
                into.copy_(result)

        return run

def _flash_attn_fwd(q, k, v, *, softmax_scale, return_lse, block_sparse_tensors, mask_mod=None, aux_tensors=None):
    assert return_lse and dense_math.is_aligned(q, k, v)
    seen = dense_math.seen_of_lists(block_sparse_tensors, mask_mod, aux_tensors, q, k, of_keys=False)
    return *dense_math.forward(q, k, v, softmax_scale, False, seen=seen), None, None, None

def _flash_attn_bwd(q, k, v, out, dout, lse, *, softmax_scale, dlse, causal=False, window_size_left=None,
                    window_size_right=None, block_sparse_tensors=None, mask_mod=None, aux_tensors=None):
    assert dense_math.is_aligned(q, k, v, out, dout)
    window = window_size_left, window_size_right
    seen = dense_math.seen_of_lists(block_sparse_tensors, mask_mod, aux_tensors, q, k, of_keys=True)
    return dense_math.backward(dout, q, k, v, out, lse, softmax_scale, causal, window, dlse, seen)
""",
    "flash_attn_4-4.0.0b36.dist-info/METADATA": "Metadata-Version: 2.1\nName: flash-attn-4\nVersion: 4.0.0b36\n",
}
