"""`conform matrix`: verbs and features by backends, every cell counted from reports and from nothing else."""
