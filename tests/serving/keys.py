"""The API keys of the servers in the tests."""

import hashlib

KEYS = ("first-key", "clef-&+%")
HASHES = [hashlib.sha256(key.encode()).hexdigest() for key in KEYS]
