"""Distilling what divergent teachers know into a merged student, on pseudo-data."""
