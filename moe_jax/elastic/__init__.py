"""Ranks that come and go, as traced data, so that nothing is compiled again: ``rank_table``."""
