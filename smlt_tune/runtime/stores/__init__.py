"""Parameter stores and object stores, one file each, behind the protocols of ``base``."""
