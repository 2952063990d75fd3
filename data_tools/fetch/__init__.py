"""Getting the papers: PMC's open-access subset and S2ORC, from where they are published."""
