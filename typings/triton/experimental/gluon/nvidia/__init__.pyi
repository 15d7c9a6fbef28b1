"""What the host gives to kernels on NVIDIA's cards."""
