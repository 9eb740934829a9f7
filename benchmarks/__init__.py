"""What the project costs beside raw tools, measured in one run: python -m benchmarks [NAME ...]."""
