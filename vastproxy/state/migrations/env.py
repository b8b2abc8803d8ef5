"""What alembic runs around the scripts: over the connection, and in the transaction, of migrate."""

from alembic import context

from vastproxy.state.tables import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
context.run_migrations()
