"""The way of one ad request; start reading at ad_server.py."""
