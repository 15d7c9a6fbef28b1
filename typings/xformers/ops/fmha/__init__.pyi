"""Fused multi-head attention."""

from . import attn_bias as attn_bias
from . import common as common
from . import cutlass as cutlass
from . import flash as flash
