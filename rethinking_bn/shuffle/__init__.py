"""Rows permuted over ranks and brought back, by all_to_all: section 6 of arXiv 2105.07576."""
