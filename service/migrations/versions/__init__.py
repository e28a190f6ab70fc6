"""One page for each revision of the ledger's tables."""
