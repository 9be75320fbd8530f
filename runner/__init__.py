"""How any experiment runs: composes, trains, records, compares. Knows no method and no env by name."""
