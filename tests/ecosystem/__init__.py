"""Libraries that users bring along, at the versions of `tests/ecosystem.txt`."""
