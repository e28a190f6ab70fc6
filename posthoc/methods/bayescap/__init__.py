"""BayesCap: a generalised Gaussian around a frozen output that stays what it is."""
