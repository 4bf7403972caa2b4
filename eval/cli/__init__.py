"""The command `rowint8`."""
