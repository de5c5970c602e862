"""What the library costs beside code split by hand, and beside its peers."""
