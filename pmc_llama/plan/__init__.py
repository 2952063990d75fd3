"""What a run will need, before it runs: memory of a GPU and of its host, time, money, and what to change."""
