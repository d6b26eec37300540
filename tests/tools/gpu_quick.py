"""What tools/benchmark.py gpu runs, at toy sizes in Triton's interpreter."""

from __future__ import annotations

import torch

from benchmarks import Options, compare
from benchmarks.report import as_markdown

if __name__ == "__main__":
    print(as_markdown(compare("gpu", Options(torch.device("cpu"), quick=True))))
