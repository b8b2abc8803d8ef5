"""Which release this is: apart, so that every layer may say it."""

__version__ = "0.1.0"
