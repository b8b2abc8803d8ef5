"""What an ad request costs: vastproxy against a floor without XML, and against a peer."""
