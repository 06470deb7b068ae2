"""Watching a fleet from another process, while it runs or after it: from its journal, read-only."""
