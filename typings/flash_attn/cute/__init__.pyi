"""FlashAttention-4 (flash-attn-4 4.0.0b36), as far as it is used here."""
