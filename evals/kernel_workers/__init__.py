"""Scripts that run in a Python of their own and time a peer's layers on request; see `loop.py`."""
