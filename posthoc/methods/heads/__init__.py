"""Ensembles of refitted last layers: nonparametric posteriors on cached features."""
