"""Raw files to a token store."""
