"""Measures lumed beside its peers; started by scripts/bench."""
