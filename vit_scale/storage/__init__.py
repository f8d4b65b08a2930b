"""Files on disk and in buckets by one interface: paths, compare-and-swap, and downloads."""
