"""The history of the tables, as alembic scripts."""
