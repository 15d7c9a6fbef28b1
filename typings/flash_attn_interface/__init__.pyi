"""FlashAttention-3, built from flash-attention's `hopper` folder: importing it registers torch.ops.flash_attn_3."""
