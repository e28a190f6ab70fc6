"""Variational Bayesian last layers: `layer` (both tasks), `student` and `generative`.

Harrison, Willes & Snoek 2024, arXiv:2404.11599, in the form that is trained after the network:
features stay frozen, and the prior is centred on the frozen head instead of on zero.
"""
