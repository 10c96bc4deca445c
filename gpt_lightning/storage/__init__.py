"""Files on disk: atomic writes, checksums, the cache folder."""
