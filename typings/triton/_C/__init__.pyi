"""What is compiled of Triton."""
