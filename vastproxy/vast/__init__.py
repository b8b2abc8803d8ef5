"""The rules of VAST: no network, no clock, no config."""
