"""What the end-to-end tests, the demo and the benchmarks share: private clusters, data sets, helpers that wait."""
