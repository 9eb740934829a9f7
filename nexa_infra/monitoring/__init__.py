"""What a run costs and uses: prices, costs, the report."""
