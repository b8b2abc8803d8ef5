"""Ad servers: whom the proxy asks, and how."""
