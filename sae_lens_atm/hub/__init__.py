"""Load SAEs from disk or the Hub, and push them there."""
