"""Drift: is a stream of scores, errors or coverages still what it was."""
