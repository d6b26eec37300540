"""What studies, benchmarks and tests share: this machine's processes, and what it is."""
