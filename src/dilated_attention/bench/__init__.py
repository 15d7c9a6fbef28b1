"""`dilated-attention bench`: correct first, then timed; runs kept, compared and scaled over several ranks."""
