"""Ad servers, proxy and page on loopback: a chain to look at."""
