"""Ranks that come and go, as traced data, so that nothing is compiled again, and ranks that are slow."""
