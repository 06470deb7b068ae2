"""Translations between tuners and fleets. None imports another."""
