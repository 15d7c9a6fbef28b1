"""The namespace that flash-attn and flash-attn-4 share."""
