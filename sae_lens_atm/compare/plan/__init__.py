"""What a comparison trains."""
