"""The sans-IO core: bytes in, events out. No async, no event loop, no clock in here."""
