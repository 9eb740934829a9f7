"""Making a cluster ready."""
