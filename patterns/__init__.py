"""The patterns that ship with the package, one file each."""
