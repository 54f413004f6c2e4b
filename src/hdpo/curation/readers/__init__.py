"""One file for the sources of one kind: a raw row becomes a Record. `hdpo.curation.source` lists them by name."""
