"""What is told about the work: log, trace, tasks."""
