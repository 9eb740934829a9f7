"""The same command inside an image."""
