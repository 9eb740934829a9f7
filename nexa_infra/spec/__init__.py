"""What was asked: a config file, checked, as frozen models."""
