"""What a task costs in maps and executors, next to the usual pools in the same guest."""
