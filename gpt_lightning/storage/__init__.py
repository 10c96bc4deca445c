"""Files and folders written as a whole, checksums, the cache."""
