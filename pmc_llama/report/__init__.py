"""The table of a study: models by sets of questions, beside what was published."""
