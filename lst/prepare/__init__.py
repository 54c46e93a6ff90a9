"""Making corpora: from raw sources to the folders that training reads."""
