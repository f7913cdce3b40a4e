"""Results of a comparison: tables, charts, HTML."""
