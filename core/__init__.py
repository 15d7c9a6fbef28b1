"""The vocabulary and the mathematics: patterns, layouts, the composer, the oracle. Imports nothing else of ours."""
