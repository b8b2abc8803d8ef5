"""HTTP in and out: the only code that sees aiohttp.web."""
