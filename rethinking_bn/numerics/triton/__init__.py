"""The numeric core in Triton kernels: all tensors of a layer in each launch.

Nothing outside imports Triton: :mod:`choice` says whether it is there.
"""
