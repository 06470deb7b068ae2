"""The end client: fleet, scheduler, ledger, platforms (paper 1)."""
