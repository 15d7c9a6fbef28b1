"""xformers 0.0.34 and 0.0.35, as far as it is used here."""
