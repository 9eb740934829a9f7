"""What a run is: its directory, its record, its results."""
