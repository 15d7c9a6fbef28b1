"""Context parallelism: one sequence sharded over ranks, each fetching only the rows that its queries name."""
