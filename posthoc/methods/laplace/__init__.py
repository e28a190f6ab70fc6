"""Last-layer Laplace approximations, one structure of the curvature a page.

`kron` (registered as ``laplace``), `diag` (``laplace_diag``), `full` (``laplace_full``) and
`identity` (``icla``). `settings`, `sums`, `prior`, `criteria`, `noise`, `joint` and `factored`
are what they share; `importing` reads a posterior that was fitted with laplace-torch.
"""
