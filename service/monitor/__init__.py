"""`hedged monitor`: reads a ledger and publishes what needs history."""
