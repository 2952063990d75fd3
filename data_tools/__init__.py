"""Papers to token files: readers, cleaning, tokenization, the `.bin/.idx` format, corpora."""
