"""What NVIDIA's cards have."""
