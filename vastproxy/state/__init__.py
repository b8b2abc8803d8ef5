"""What outlives a request: counts, money, cookies; in memory, Redis or SQL."""
