"""`python -m dilated_attention` is the command `dilated-attention`."""

from .cli import main

if __name__ == "__main__":
    main()
