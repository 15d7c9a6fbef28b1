"""The backends that ship with the package, one file each."""
