"""One ad request's identity, cookies and clock."""
